"""Run functions when a module is imported, without importing it."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_actions: dict[str, list[Callable[[], None]]] = {}
_unfinished: set[str] = set()
"""Modules that were half imported, by another thread or by a circular import, when an action was asked for."""


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` whenever the module ``name`` has been executed: now, if it is imported, and after each import.

    Actions of one module run in the order in which they were given, in the thread that imports it, before its import
    statement returns. If the module is half imported at the time of this call, ``action`` runs when the next import of
    any module after its end begins. An action must bear to be called again: a module may be reloaded, or be imported by
    another thread while this function runs.

    An error of ``action`` is the importer's error: the import fails with it, and the next import tries again. If the
    import itself fails, no action runs and all of them wait for the next import.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # The action is noted before sys.modules is asked: a module that another thread imports in between is not missed.
    _actions.setdefault(name, []).append(action)
    if name in sys.modules:
        if is_half_imported(name):
            _unfinished.add(name)
        else:
            action()


def is_half_imported(name: str) -> bool:
    """Whether the module ``name`` is being executed now."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _run_late_actions() -> None:
    for name in tuple(_unfinished):
        if not is_half_imported(name):
            _unfinished.discard(name)
            if name in sys.modules:
                _run_actions(name)


def _run_actions(name: str) -> None:
    for action in tuple(_actions[name]):
        action()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules that have actions as the other finders would, with a loader that runs the actions."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if _unfinished:
            _run_late_actions()
        if fullname not in _actions:
            return None
        for finder in tuple(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, fullname)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A module's loader that runs the module's actions afterwards; the module itself is left with its usual loader."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def __getattr__(self, name: str) -> Any:
        """``get_source`` and so on, for those who ask for a spec and do not import."""
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run_actions(self._name)


_FINDER = _Finder()
