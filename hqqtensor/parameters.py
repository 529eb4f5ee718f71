"""Putting quantized parameters into a model's modules, and showing them in its repr."""

from torch import nn

from hqqtensor.tensor import HQQTensor


def replace_parameters(model: nn.Module, new_by_id: dict[int, nn.Parameter]) -> None:
    """Replace each parameter ``old`` by ``new_by_id[id(old)]``, wherever ``model`` uses it; others are left alone."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in new_by_id:
                module._parameters[name] = new_by_id[id(old)]
        show_quantized(module)


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
