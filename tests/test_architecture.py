"""Who may import whom (docs/architecture.md): layers one way, no circles, no private names of other modules.

All imports count, those within functions and under ``TYPE_CHECKING`` too: they would only hide a circle.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hqqtensor

PACKAGE = Path(hqqtensor.__file__).parent

LAYERS = {
    "formats": set(),
    "packing": set(),
    "solvers": {"formats"},
    "config": {"formats", "solvers"},
    "transforms": {"config", "solvers"},
    "stored_size": {"config", "formats", "packing", "solvers"},
    "ops": {"formats", "packing", "solvers"},
    "kernels": {"formats", "packing", "solvers", "ops"},
    "encode": {"config", "formats", "ops", "packing", "solvers", "stored_size", "transforms"},
}
"""What each of the lower layers may import of the package."""

LAYER_EXCEPTIONS = {("ops", "kernels.cpu"), ("ops", "kernels.triton")}
"""(module, imported module): ``import hqqtensor.ops`` is what registers the backends."""

CIRCLES_WITHIN = {
    "tensor": "each module adds what torch functions do with HQQTensor, which tensor/__init__.py defines",
    "integrations.transformers": "its modules take names from the package, which imports them later",
}
"""Packages whose modules still import one another in a circle. To be emptied."""

PRIVATE_EXCEPTIONS: set[tuple[str, str]] = set()
"""(module, private name of another module that it uses)."""


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target``, a module of the package (both without the package's name), or a name from it."""

    module: str
    target: str
    name: str | None
    alias: str
    line: int


@dataclass(frozen=True)
class Source:
    path: Path
    tree: ast.Module


def sources(package: Path) -> dict[str, Source]:
    """The modules of a package by name without the package's: "" is its ``__init__.py``."""
    result = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        name = name.removesuffix("__init__").removesuffix(".")
        result[name] = Source(path, ast.parse(path.read_text(encoding="utf-8")))
    return result


def imports(package: Path, modules: dict[str, Source]) -> Iterator[Import]:
    """All imports of modules of the package by others, wherever they stand."""
    for module, source in modules.items():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    target = within(package.name, alias.name)
                    if target in modules:
                        bound = alias.asname or alias.name.partition(".")[0]
                        yield Import(module, target, None, bound, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{source.path}:{node.lineno}: imports are absolute here"
                home = within(package.name, node.module or "")
                for alias in node.names if home is not None else ():
                    submodule = f"{home}.{alias.name}".removeprefix(".")
                    target, name = (submodule, None) if submodule in modules else (home, alias.name)
                    assert target in modules, f"{source.path}:{node.lineno}: there is no module {target!r}"
                    if target != module:  # a package's compiled extension is taken from the package itself
                        yield Import(module, target, name, alias.asname or alias.name, node.lineno)


def within(package: str, name: str) -> str | None:
    """``name`` without the package's name; None where it is of another package."""
    first, _, rest = name.partition(".")
    return rest if first == package else None


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Sets of modules each of which imports every other, directly or not."""
    imported: dict[str, set[str]] = {}
    for module, target in edges:
        imported.setdefault(module, set()).add(target)
    reachable: dict[str, set[str]] = {}
    for start in imported:
        seen, waiting = set(), [start]
        while waiting:
            new = imported.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reachable[start] = seen
    groups = {frozenset(m for m in reachable[start] if start in reachable.get(m, ())) for start in reachable}
    return sorted(sorted(group) for group in groups if group)


def is_of(package: str, module: str) -> bool:
    return module == package or module.startswith(package + ".")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_C"  # _C: the compiled extension


def private_uses(package: Path, modules: dict[str, Source]) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of private names that are imported, or taken from an imported module or class."""
    by_module: dict[str, list[Import]] = {}
    for each in imports(package, modules):
        by_module.setdefault(each.module, []).append(each)
        if each.name is not None and private(each.name):
            yield each.module, each.name, each.line
    for module, of_module in by_module.items():
        names = {each.alias: names_of(modules[each.target].tree, each.name) for each in of_module}
        for node in ast.walk(modules[module].tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if private(node.attr) and node.attr in names.get(node.value.id, ()):
                yield module, f"{node.value.id}.{node.attr}", node.lineno


def names_of(tree: ast.Module, name: str | None) -> set[str]:
    """Names that a module defines, or the class ``name`` of it."""
    body = tree.body
    if name is not None:
        body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), [])
    defined = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assigned = [
        n.targets if isinstance(n, ast.Assign) else [n.target]
        for n in body
        if isinstance(n, (ast.Assign, ast.AnnAssign))
    ]
    return defined | {
        n.id for targets in assigned for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)
    }


MODULES = sources(PACKAGE)
IMPORTS = list(imports(PACKAGE, MODULES))


def test_layers_import_downwards_only() -> None:
    wrong = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in IMPORTS
        for layer, allowed in LAYERS.items()
        if is_of(layer, i.module)
        and not any(is_of(other, i.target) for other in (layer, *allowed))
        and (i.module, i.target) not in LAYER_EXCEPTIONS
    ]
    assert wrong == []
    assert {(i.module, i.target) for i in IMPORTS} >= LAYER_EXCEPTIONS, "an exception is no longer needed: remove it"


def test_no_modules_import_one_another() -> None:
    found = circles({(i.module, i.target) for i in IMPORTS})
    excused = {package: [c for c in found if all(is_of(package, m) for m in c)] for package in CIRCLES_WITHIN}
    assert [c for c in found if not any(c in of_package for of_package in excused.values())] == []
    assert all(excused.values()), f"a package has no circle any more, remove it from CIRCLES_WITHIN: {excused}"


def test_no_module_uses_private_names_of_another() -> None:
    uses = list(private_uses(PACKAGE, MODULES))
    assert [f"{m}:{line} uses {name}" for m, name, line in uses if (m, name) not in PRIVATE_EXCEPTIONS] == []
    assert {(m, name) for m, name, _ in uses} >= PRIVATE_EXCEPTIONS, "an exception is no longer needed: remove it"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A package with one of each fault."""
    files = {
        "__init__.py": "",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.b import B\n_x = 1\ny = 2\n",
        "b.py": "import toy.c\nclass B:\n    _hidden = 1\n    def _method(self): ...\n",
        "c.py": "def f():\n    from toy import a\n    return a._x + a.y + a.__dict__\n",
        "d.py": "from toy.a import _x, y\nfrom toy.b import B as Other\nOther._method\nOther._hidden\nOther._unknown\n",
        "sub/__init__.py": "from toy.sub.e import E\n",
        "sub/e.py": "from toy import d\nE = d.__name__\n",
    }
    for name, text in files.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "toy"


def test_the_checks_see_what_they_are_for(toy: Path) -> None:
    modules = sources(toy)
    assert list(modules) == ["", "a", "b", "c", "d", "sub", "sub.e"]
    edges = {(i.module, i.target) for i in imports(toy, modules)}
    assert edges == {("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"), ("d", "b"), ("sub", "sub.e"), ("sub.e", "d")}
    assert circles(edges) == [["a", "b", "c"]]
    assert sorted(private_uses(toy, modules)) == [
        ("c", "a._x", 3), ("d", "Other._hidden", 4), ("d", "Other._method", 3), ("d", "_x", 1),
    ]  # fmt: skip
