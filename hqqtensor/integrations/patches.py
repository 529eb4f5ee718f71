"""The one way in which hqqtensor changes another library: ``wrap`` a function, ``register`` entries in a table.

Each change is recorded as a ``Patch``, with what needs it and the version of the library that it was tested with;
``patches()`` lists them. The same change may be asked for again at any time: a function that we have wrapped is marked.
Wrappers that others make with ``functools.wraps`` copy the mark, so that we do not wrap them in turn; a wrapper without
the mark gets ours around it, even if ours is inside as well, which does no harm.

If the target is gone, as in another version of the library, importing the library still works. A PatchWarning names the
library, its version, the version tested with, the missing target and what will not work. The error, a PatchError with
the same text, comes when something is used that needs the target: ``require`` raises it, which the functions of
``hqqtensor.integrations`` call. Where a library never calls us, its operation on a quantized weight fails instead, and
that NotImplementedError ends with the same text (``hqqtensor.tensor.unsupported``).
"""

import functools
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_MARK = "__hqqtensor_patch__"
_patches: dict[tuple[str, str, str], "Patch"] = {}
_lock = threading.RLock()


class PatchError(RuntimeError):
    """Something was used that needs a change of another library which could not be made."""


class PatchWarning(UserWarning):
    """A change of another library could not be made: what needs it will not work."""


@dataclass(eq=False)
class Patch:
    """One change of another library.

    library: its distribution's name. target: dotted name of what is changed. reason: what needs the change.
    tested_with: version of the library that the change was tested with. problem: why the change could not be made,
    None where it is in place.
    """

    library: str
    target: str
    reason: str
    tested_with: str
    problem: str | None = field(default=None)

    @property
    def version(self) -> str:
        """Version of the library that is installed here, "unknown" where it does not say."""
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def error_text(self) -> str:
        """One sentence each on what is missing, what needs it, and the version that has it."""
        return (
            f"hqqtensor cannot change {self.library} {self.version}: {self.problem}. Without that, {self.reason} does "
            f"not work. hqqtensor was tested with {self.library} {self.tested_with}."
        )


def patches() -> list[Patch]:
    """All changes that were asked for in this process, in that order: those of libraries that are imported."""
    return list(_patches.values())


def problems() -> list[str]:
    """The text for each change that could not be made."""
    return [patch.error_text() for patch in patches() if patch.problem is not None]


def require(*targets: str) -> None:
    """PatchError if one of the targets (beginnings of dotted names, "peft." for all of peft's) could not be changed."""
    for patch in patches():
        if patch.problem is not None and patch.target.startswith(targets):
            raise PatchError(patch.error_text())


def wrap(
    module: str,
    name: str,
    make: Callable[[Any], Callable],
    reason: str,
    tested_with: str,
    also: Iterable[str] = (),
) -> None:
    """Replace the function ``name`` of an imported ``module`` by ``make(function)``, once.

    name: a function's, or ``Class.method``. make: takes the function that is there (somebody else may have wrapped it)
    and returns the one to put in its place, which gets its name, docstring and signature. reason, tested_with: see
    ``Patch``. also: further libraries that import the function from this one.

    Modules of the library (and of ``also``) that have imported the function by ``from ... import`` get the new one too.
    """
    with _lock:
        patch = _record(module, name, reason, tested_with)
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = _follow(sys.modules[module], owner_name)
            function = getattr(owner, leaf)
        except AttributeError as error:
            _fail(patch, str(error))
            return
        patch.problem = None
        if getattr(function, _MARK, None) is patch:
            return
        new = _marked(make, function, patch)
        setattr(owner, leaf, new)
        if owner_name:
            return
        libraries = {module.partition(".")[0], *also}
        # Modules may hold the function as it was before somebody else wrapped it: these get a wrapper of that one.
        inner = getattr(function, "__wrapped__", None)
        for other_name, other in list(sys.modules.items()):
            if other_name.partition(".")[0] not in libraries:
                continue
            held = getattr(other, "__dict__", {}).get(leaf)
            if held is function:
                setattr(other, leaf, new)
            elif held is not None and held is inner:
                setattr(other, leaf, _marked(make, inner, patch))


def register(module: str, name: str, entries: Any, reason: str, tested_with: str) -> None:
    """Put ``entries`` (a dict, or values for a list or a set) into the table ``name`` of an imported ``module``."""
    with _lock:
        patch = _record(module, name, reason, tested_with)
        try:
            table = _follow(sys.modules[module], name)
        except AttributeError as error:
            _fail(patch, str(error))
            return
        patch.problem = None
        if isinstance(table, list):
            table += [entry for entry in entries if entry not in table]
        elif isinstance(table, (dict, set)):
            table.update(entries)
        else:
            _fail(patch, f"{module}.{name} is no dict, list or set but a {type(table).__name__}")


def find(module: str, name: str, reason: str, tested_with: str, library: str | None = None) -> Any:
    """What ``name`` (dotted) of an imported ``module`` is, to register something of ours with it; None if it is gone.

    library: whose it is, where ``module`` does not say.
    """
    with _lock:
        patch = _record(module, name, reason, tested_with, library)
        try:
            value = _follow(sys.modules[module], name)
        except AttributeError as error:
            _fail(patch, str(error))
            return None
        patch.problem = None
        return value


def failed(module: str, error: Exception, reason: str, tested_with: str) -> None:
    """Note that what hqqtensor does when ``module`` is imported ended in ``error``, and warn."""
    _fail(_record(module, "*", reason, tested_with), f"{type(error).__name__}: {error}")


def _record(module: str, name: str, reason: str, tested_with: str, library: str | None = None) -> Patch:
    key = (module, name, reason)
    if key not in _patches:
        library = library or module.partition(".")[0]
        _patches[key] = Patch(library, f"{module}.{name}", reason, tested_with)
    return _patches[key]


def _fail(patch: Patch, problem: str) -> None:
    patch.problem = problem
    warnings.warn(patch.error_text(), PatchWarning, stacklevel=2)


def _follow(owner: Any, name: str) -> Any:
    for part in name.split(".") if name else ():
        owner = getattr(owner, part)
    return owner


def _marked(make: Callable[[Any], Callable], function: Any, patch: Patch) -> Callable:
    wrapper = functools.wraps(function)(make(function))
    setattr(wrapper, _MARK, patch)
    return wrapper
