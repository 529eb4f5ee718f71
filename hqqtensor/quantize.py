"""quantize_ and dequantize_: choose the weights, check all of them, encode all of them, then swap them in."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from hqqtensor.config import HqqConfig
from hqqtensor.encode import check_weight
from hqqtensor.selection import choose, row_dims
from hqqtensor.tensor import HQQTensor

if TYPE_CHECKING:
    from hqqtensor.calibration import Calibration


def quantize_(
    model: nn.Module,
    config: HqqConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    calibration: "Calibration | None" = None,
) -> None:
    """Replace weights of ``model`` by HQQTensors, in place; every module stays the class it was.

    Chosen are the ``nn.Linear`` modules, transformers' ``Conv1D`` and 3-D expert weights (or the modules that
    ``filter_fn(module, name)`` accepts), and embeddings and convolutions that a ``dynamic_config`` tag names, less
    ``skip_modules``.
    All checks come first and all new weights are made before the first is swapped in, so that an error leaves the
    model as it was. Tied weights are quantized once and stay tied. Weights that are quantized already are left
    alone with a warning. ``device``: where to quantize and where the whole model is afterwards.
    ``progress(done, total, name)``: called after each weight, in weights. ``calibration``: from
    ``hqqtensor.calibration.calibrate``; weights that it knows nothing of are quantized without.

    Raises TypeError or ValueError naming the module: bad weight, tag that matches nothing, nothing to quantize.
    """
    if not isinstance(config, HqqConfig):
        raise TypeError(f"config must be an HqqConfig, got {type(config).__name__}")
    choices, already = choose(model, config, filter_fn)
    for choice in choices:
        choice.check(choice.weight)
    if already:
        warnings.warn(
            f"{len(already)} weights are quantized already and were left alone, e.g. {already[0]}", stacklevel=2
        )
    if not choices:
        if already:
            return
        raise ValueError("nothing to quantize: no nn.Linear (or module that filter_fn accepts) outside skip_modules")

    total, done = sum(choice.weight.numel() for choice in choices), 0
    made: dict[int, nn.Parameter] = {}

    def count(weight: nn.Parameter, name: str) -> None:
        nonlocal done
        done += weight.numel()
        if progress is not None:
            progress(done, total, name)

    if calibration is not None:
        from hqqtensor.calibration.apply import check_plan, quantize_calibrated

        linears = [choice for choice in choices if choice.weight.ndim == 2 and not choice.transposed]
        check_plan(linears, calibration)
        made = quantize_calibrated(model, linears, calibration, count)
    for choice in choices:
        weight, name = choice.weight, choice.names[0]
        if id(weight) in made:
            continue
        try:
            made[id(weight)] = choice.quantize(weight if device is None else weight.to(device))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        count(weight, name)
    replace_parameters(model, made)
    if device is not None:
        model.to(device)


def dequantize_(model: nn.Module) -> None:
    """Replace every HQQTensor of ``model`` by the dense weight it stands for, in place; ties are kept."""
    made: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        if isinstance(parameter, HQQTensor):
            made[id(parameter)] = nn.Parameter(parameter.dequantize(), requires_grad=False)
    replace_parameters(model, made)


def replace_parameters(model: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Put ``made[id(old)]`` wherever the parameter ``old`` is used in ``model``."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in made:
                module._parameters[name] = made[id(old)]
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


def check_without_names(config: HqqConfig) -> None:
    """ValueError for settings by the name of a module, which torchao's ``quantize_`` does not pass on."""
    if config.dynamic_config:
        raise ValueError("dynamic_config needs module names, which torchao's quantize_ does not pass; use FqnToConfig")
    if set(config.skip_modules) - {"lm_head"}:
        raise ValueError(
            f"skip_modules {config.skip_modules} need module names, which torchao's quantize_ does not pass; use "
            "hqqtensor's, a filter_fn, or modules_to_not_convert of TorchAoConfig"
        )


@register_quantize_module_handler(HqqConfig)
def _torchao_handler(module: nn.Module, config: HqqConfig, *, parameter_name: str = "weight") -> nn.Module:
    """torchao's ``quantize_`` and ``FqnToConfig`` call this; they pass no names, so tags cannot be applied."""
    check_without_names(config)
    old: Any = getattr(module, parameter_name)
    if isinstance(old, HQQTensor):
        return module
    settings = config.for_tag(None)
    assert settings is not None
    folded = row_dims(module) if parameter_name == "weight" else 1
    check_weight(old, settings, f"{type(module).__name__}.{parameter_name}", folded)
    setattr(module, parameter_name, nn.Parameter(HQQTensor.from_hp(old, settings, folded), requires_grad=False))
    show_quantized(module)
    return module
