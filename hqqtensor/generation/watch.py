"""Whether a model is still what a decoder was built of: asked for every token, so it costs tens of microseconds."""

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

_version, _no_dispatch = attrgetter("_version"), torch._C.DisableTorchFunctionSubclass


class Watch:
    """Children of a module, with all modules and parameters in them, as they are now."""

    def __init__(self, parent: nn.Module, children: Iterable[str]) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[Any] = []
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

    def _add(self, values: dict[str, Any], name: str, value: Any) -> None:
        self._dicts.append(values)
        self._names.append(name)
        self._values.append(value)

    def _now(self) -> list[int]:
        with _no_dispatch():  # a subclass would be asked in Python each time
            return list(map(_version, self._tensors))

    def unchanged(self) -> bool:
        """Whether modules and parameters are the same objects with the same numbers, and nobody hooks in or trains.

        A tensor's numbers are told by torch's count of its changes: a change through ``.data`` or numpy is not seen.
        """
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and all(map(is_, map(type, self._modules), self._types))
            and not any(self._hooks)
            and self._now() == self._versions
        )
