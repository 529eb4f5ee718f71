"""docs/api.md from the docstrings, read from the sources: nothing is imported."""

import ast
import re
import textwrap
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hqqtensor"
MODULES: dict[str, tuple[str, ...]] = {
    "hqqtensor": (),
    "hqqtensor.calibration": (),
    "hqqtensor.search": (),
    "hqqtensor.compile": ("JoinLinears",),
    "hqqtensor.integrations.transformers": ("adopt", "model_card", "register"),
    "hqqtensor.integrations.transformers.cache": ("HqqQuantizedCache",),
    "hqqtensor.generation": ("growing_cache",),
    "hqqtensor.generation.together": ("GenerateTogether",),
    "hqqtensor.integrations.peft": ("register",),
    "hqqtensor.diagnostics": ("model_size",),
    "hqqtensor.background": ("JobProgress",),
    "hqqtensor.transfer": (),
    "hqqtensor.diagnostics.monitor": ("PerformanceMonitor",),
    "hqqtensor.diagnostics.usage": ("UsagePerformance", "PassTimes", "ProductCount"),
    "hqqtensor.diagnostics.language": ("compare_language_models", "token_windows"),
    "hqqtensor.serialization": ("inspect_checkpoint", "CheckpointInfo", "TensorInfo"),
    "hqqtensor.serialization.layout": ("CheckpointError",),
    "hqqtensor.formats": ("Format", "Levels", "TableFormat", "format_names", "get_format", "register_format"),
    "hqqtensor.solvers": ("Solution", "Solver", "get_solver", "register_solver", "solver_names"),
    "hqqtensor.packing": ("byte_offset", "pack", "row_bytes", "unpack"),
    "hqqtensor.ops.backend": ("Backend", "BackendStatus", "describe_backends", "register_backend"),
    "hqqtensor.kernels.cpu": ("instruction_set", "why_unavailable"),
    "hqqtensor.kernels.triton": ("why_unavailable",),
}
"""Public modules; an empty tuple stands for the module's ``__all__``."""
START = """# API reference

Every public name with its docstring. `python -m benchmarks.docs` writes this page from the sources; edit them, not it.
For how to use them start at the [table of tasks](index.md); for words see the [glossary](glossary.md).
"""


@dataclass
class Found:
    """A definition: the statement, and for a constant the text that follows it."""

    node: ast.stmt
    text: str


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _body(module: str) -> list[ast.stmt]:
    return ast.parse(_file(module).read_text(encoding="utf-8")).body


def public_names(module: str) -> list[str]:
    """The names of MODULES, or of ``__all__``, functions and classes as they are written there."""
    if MODULES[module]:
        return list(MODULES[module])
    values = {ast.unparse(n.targets[0]): n.value for n in _body(module) if isinstance(n, ast.Assign)}
    if "__all__" not in values:
        raise ValueError(f"{module} has no __all__")
    names = values["__all__"]
    if isinstance(names, ast.List) and names.elts and isinstance(names.elts[0], ast.Starred):  # [*_TABLE]
        names = values[ast.unparse(names.elts[0].value)]
    return sorted(ast.literal_eval(names), key=str.lower)


def find(module: str, name: str) -> Found:
    """The definition of ``name``, imports followed; LookupError where there is none."""
    body = _body(module)
    for i, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and not _is_overload(node):
            return Found(node, ast.get_docstring(node) or "")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return Found(node, _text_after(body, i))
    for node in ast.walk(ast.Module(body, [])):  # imports for type checkers alone, too
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hqqtensor"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    raise LookupError(f"{module} has no {name}")


def _is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list)


def _text_after(body: list[ast.stmt], i: int) -> str:
    """The string that follows a constant, as its docstring."""
    if i + 1 < len(body) and isinstance(body[i + 1], ast.Expr):
        value = body[i + 1].value  # type: ignore[attr-defined]
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return textwrap.dedent(value.value).strip()
    return ""


def _type(node: ast.expr | None) -> str:
    """An annotation as written, without the quotes of a forward reference."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "" if node is None else ast.unparse(node)


def _arguments(args: ast.arguments) -> list[str]:
    """Each argument as in a signature: ``name: type = default``; ``self`` and ``cls`` are left out."""

    def one(arg: ast.arg, prefix: str = "", default: ast.expr | None = None) -> str:
        text = prefix + arg.arg + (f": {_type(arg.annotation)}" if arg.annotation else "")
        return text if default is None else f"{text} = {ast.unparse(default)}"

    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    out = [one(a, "", d) for a, d in zip(plain, defaults, strict=True) if a.arg not in ("self", "cls")]
    if args.vararg:
        out.append(one(args.vararg, "*"))
    elif args.kwonlyargs:
        out.append("*")
    out += [one(a, "", d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return out + ([one(args.kwarg, "**")] if args.kwarg else [])


def _field(node: ast.AnnAssign) -> str:
    """A dataclass's field as an argument."""
    text = re.sub(r"field\(default_factory=lambda: (.*)\)$", r"\1", ast.unparse(node))
    return text.replace("field(default_factory=dict)", "{}").replace("field(default_factory=list)", "[]")


def _signature(node: ast.FunctionDef | ast.ClassDef) -> tuple[str, list[str], str]:
    """Name, arguments and result; of a dataclass its fields, of another class the arguments of ``__init__``."""
    if isinstance(node, ast.FunctionDef):
        return node.name, _arguments(node.args), f" -> {_type(node.returns)}" if node.returns else ""
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return node.name, [_field(n) for n in node.body if isinstance(n, ast.AnnAssign)], ""
    inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return node.name, _arguments(inits[0].args) if inits else [], ""


def _code(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The signature as a code block; one argument a line where it is long."""
    name, arguments, result = _signature(node)
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) > 100 and arguments:
        line = "\n".join([f"{name}(", *(f"    {one}," for one in arguments), f"){result}"])
    return f"```text\n{line}\n```"


_NAME = r"`{0,2}[A-Za-z_]\w*`{0,2}"
_ITEM = re.compile(rf"(?P<indent> *)(?P<names>{_NAME}(?:, {_NAME})*)(?P<more> \([^)]*\))?: (?P<text>.*)")


def _items(lines: list[str], known: Set[str]) -> set[int]:
    """Lines that start an entry "name: text": indented or ``known``, and if their text goes on, it does so indented."""
    found = set()
    for i, line in enumerate(lines):
        if match := _ITEM.fullmatch(line):
            names = {name.strip("`") for name in match["names"].split(", ")}
            if match["indent"] or names <= known:
                found.add(i)
    for i in sorted(found, reverse=True):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        indent = len(lines[i]) - len(lines[i].lstrip())
        goes_on = after.strip() and i + 1 not in found
        if goes_on and len(after) - len(after.lstrip()) <= indent:
            found.discard(i)
    return found


def _prose(text: str, known: Set[str] = frozenset()) -> str:
    """A docstring as Markdown: lines "name: text" of ``known`` names become list entries."""
    lines = text.splitlines()
    items, out, in_list = _items(lines, known), [], False
    for i, line in enumerate(lines):
        bare = line.strip()
        if i in items:
            match = _ITEM.fullmatch(line)
            assert match
            if out and out[-1] and not in_list:
                out.append("")
            names = ", ".join(f"`{name.strip('`')}`" for name in match["names"].split(", "))
            out.append(f"- {names}{match['more'] or ''}: {match['text']}")
            in_list = True
        elif in_list and line.startswith(" "):
            out[-1] += f" {bare}"
        else:
            if in_list and bare:
                out.append("")
            out.append(bare)
            in_list = False
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(out)).strip()


def _entry(module: str, name: str) -> str:
    found = find(module, name)
    if not found.text:
        raise ValueError(f"{module}.{name} has no docstring")
    node = found.node
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return f"### {name}\n\n{_prose(found.text)}"
    known = {one.lstrip("*").partition(":")[0] for one in _signature(node)[1]}
    code = [_code(node)] if known or isinstance(node, ast.FunctionDef) else []
    parts = [f"### {name}", *code, _prose(found.text, known)]
    for one in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_") and (text := ast.get_docstring(one)):
            own, arguments, result = _signature(one)
            is_property = any(ast.unparse(d) == "property" for d in one.decorator_list)
            call = "" if is_property else f"({', '.join(arguments)}){result}"
            names = {a.lstrip("*").partition(":")[0] for a in arguments}
            parts.append(f"`{name}.{own}{call}`  \n{_prose(text, names)}")
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    parts = [START]
    for module in MODULES:
        about = (ast.get_docstring(ast.parse(_file(module).read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        parts.append(f"## {module}\n\n{_prose(about)}")
        parts += [_entry(module, name) for name in public_names(module)]
    return "\n\n".join(part.strip() for part in parts) + "\n"
