"""Whether a model is still what a decoder was built of.

All of it is looked at before each prompt; for each token only what tells that something may have changed, since between
two tokens the weights have pushed everything else out of the caches, and a look at every module takes as long as some
layers.
"""

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

_version, _no_dispatch = attrgetter("_version"), torch._C.DisableTorchFunctionSubclass


class _Events:
    """Counts what torch tells of all modules of the process: parameters and modules that are registered anywhere."""

    count = 0

    def __init__(self) -> None:
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            register_module_parameter_registration_hook(self._count)
            register_module_module_registration_hook(self._count)
            self.installed = True

    def _count(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1


_events = _Events()


class Watch:
    """Children of a module, with all modules and parameters in them, as they are now."""

    def __init__(self, parent: nn.Module, children: Iterable[str]) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[Any] = []
        _events.install()
        tensors: list[Tensor] = []
        modules: list[nn.Module] = []
        for child in children:
            self._add(parent._modules, child, parent._modules[child])
            modules += parent.get_submodule(child).modules()
        for module in modules:
            for values in (module._modules, module._parameters):
                for name, value in values.items():
                    self._add(values, name, value)
                    if isinstance(value, Tensor) and not value.is_inference():
                        tensors.append(value)
            if not isinstance(module, nn.ModuleList):  # a list trains nothing
                self._add(module.__dict__, "training", False)
            self._add(module.__dict__, "forward", None)  # accelerate's hooks put one there
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._modules, self._types = modules, list(map(type, modules))
        self._tensors = tensors
        self._versions = self._now()
        # One parameter of each layer: what moves or converts a model replaces them all.
        few = [layer for child in children for layer in parent.get_submodule(child).children()]
        owners = [next((m for m in layer.modules() if m._parameters), layer) for layer in few]
        self._few: list[tuple[Any, str, Any]] = [(layer.__dict__, "training", False) for layer in few]
        self._few += [(m._parameters, name, m._parameters[name]) for m in owners for name in list(m._parameters)[:1]]
        self._seen = self._counts()

    def _add(self, values: dict[str, Any], name: str, value: Any) -> None:
        self._dicts.append(values)
        self._names.append(name)
        self._values.append(value)

    @staticmethod
    def _counts() -> tuple[int, int]:
        return _events.count, RemovableHandle.next_id

    def quick(self) -> bool:
        """Whether nothing tells of a change since ``unchanged`` was last true: no module, parameter or hook was
        registered in the process, and one parameter of each layer is still there. Writing into a weight's memory, or a
        ``forward`` put on a module, is seen by ``unchanged`` alone."""
        return self._seen == self._counts() and all(values.get(name) is value for values, name, value in self._few)

    def _now(self) -> list[int]:
        with _no_dispatch():  # a subclass would be asked in Python each time
            return list(map(_version, self._tensors))

    def unchanged(self) -> bool:
        """Whether modules and parameters are the same objects with the same numbers, and nobody hooks in or trains.

        A tensor's numbers are told by torch's count of its changes: a change through ``.data`` or numpy is not seen.
        """
        counts = self._counts()
        same = (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and all(map(is_, map(type, self._modules), self._types))
            and not any(self._hooks)
            and self._now() == self._versions
        )
        if same:
            self._seen = counts
        return same
