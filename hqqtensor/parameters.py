"""Putting quantized parameters into a model's modules, and showing them in its repr."""

from collections import deque

from torch import nn

from hqqtensor.tensor import HQQTensor


def replace_parameters(model: nn.Module, new_by_id: dict[int, nn.Parameter]) -> None:
    """Replace each parameter ``old`` by ``new_by_id[id(old)]``, wherever ``model`` uses it; others are left alone."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in new_by_id:
                module._parameters[name] = new_by_id[id(old)]
        show_quantized(module)


Place = tuple[nn.Module, str]
"""A module and the name under which it has a parameter."""


def places_by_id(model: nn.Module) -> dict[int, list[Place]]:
    """Where ``model`` uses each of its parameters, by the parameter's id."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def swap_together(places: list[Place], old: nn.Parameter, new: nn.Parameter) -> bool:
    """Put ``new`` in all these places in one step for other threads; False, and nothing done, where one lacks ``old``.

    The interpreter changes threads between two of its instructions only, so one call that stores in all dicts cannot
    be interrupted: no forward pass begins with some places of a tied weight old and some new.
    """
    tables = [module._parameters for module, _ in places]
    names = [name for _, name in places]
    if any(table.get(name) is not old for table, name in zip(tables, names, strict=True)):
        return False
    deque(map(dict.__setitem__, tables, names, [new] * len(names)), maxlen=0)
    for module, _ in places:
        show_quantized(module)
    return True


class QuantizedExtraRepr:
    """A module's own ``extra_repr`` followed by its quantized parameters; an object, so that it can be pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> str:
        parts = [type(self.module).extra_repr(self.module)]
        for name, parameter in self.module._parameters.items():
            if isinstance(parameter, HQQTensor):
                parts.append(f"{name}=HQQTensor({parameter.describe()})")
        return ", ".join(part for part in parts if part)


def show_quantized(module: nn.Module) -> None:
    """Let the module's repr show its quantized parameters, or no longer do so when it has none."""
    if any(isinstance(p, HQQTensor) for p in module._parameters.values()):
        module.extra_repr = QuantizedExtraRepr(module)  # type: ignore[method-assign]
    elif isinstance(module.__dict__.get("extra_repr"), QuantizedExtraRepr):
        del module.extra_repr
