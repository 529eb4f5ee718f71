"""quantize_ and dequantize_: choose the weights, check all of them, encode all of them, then swap them in."""

import fnmatch
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchao.quantization.transform_module import register_quantize_module_handler

from hqqtensor.config import HqqConfig
from hqqtensor.encode import check_weight
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

    Chosen are the ``nn.Linear`` modules (or those that ``filter_fn(module, name)`` accepts) and modules that a
    ``dynamic_config`` tag names, less ``skip_modules``. All checks come first and all new weights are made before
    the first is swapped in, so that an error leaves the model as it was. Tied weights are quantized once and stay
    tied. Weights that are quantized already are left alone with a warning. ``device``: where to quantize and
    where the whole model is afterwards. ``progress(done, total, name)``: called after each weight, in weights.
    ``calibration``: from ``hqqtensor.calibration.calibrate``; weights that it knows nothing of are quantized without.

    Raises TypeError or ValueError naming the module: bad weight, tag that matches nothing, nothing to quantize.
    """
    if not isinstance(config, HqqConfig):
        raise TypeError(f"config must be an HqqConfig, got {type(config).__name__}")
    chosen, already = _choose(model, config, filter_fn)
    users = _users_of_parameters(model)
    plan: dict[int, tuple[str, nn.Parameter, HqqConfig]] = {}
    for name, (module, settings) in chosen.items():
        weight = module.get_parameter("weight")
        full = f"{name}.weight" if name else "weight"
        check_weight(weight, settings, full)
        for owner in users.get(id(weight), []):
            skipped = _skipped(owner.rpartition(".")[0], config)
            if skipped:
                raise ValueError(f"{full} is tied to {owner}, which skip_modules ({skipped!r}) leaves alone")
        if id(weight) in plan and plan[id(weight)][2] != settings:
            raise ValueError(f"{full} is tied to {plan[id(weight)][0]}, but their settings differ")
        plan.setdefault(id(weight), (full, weight, settings))
    if already:
        warnings.warn(
            f"{len(already)} weights are quantized already and were left alone, e.g. {already[0]}", stacklevel=2
        )
    if not plan:
        if already:
            return
        raise ValueError("nothing to quantize: no nn.Linear (or module that filter_fn accepts) outside skip_modules")

    total, done = sum(weight.numel() for _, weight, _ in plan.values()), 0
    made: dict[int, nn.Parameter] = {}

    def count(key: int, full: str) -> None:
        nonlocal done
        done += plan[key][1].numel()
        if progress is not None:
            progress(done, total, full)

    if calibration is not None:
        from hqqtensor.calibration.apply import check_plan, quantize_calibrated

        check_plan(plan, calibration)
        made = quantize_calibrated(model, plan, calibration, count)
    for key, (full, weight, settings) in plan.items():
        if key in made:
            continue
        source = weight if device is None else weight.to(device)
        try:
            made[key] = nn.Parameter(HQQTensor.from_hp(source.detach(), settings), requires_grad=False)
        except ValueError as error:
            raise ValueError(f"{full}: {error}") from None
        count(key, full)
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


def tag_matches(tag: str, name: str) -> bool:
    """Whether ``tag``'s dotted parts match a run of the parts of ``name``; ``*`` in a part matches anything."""
    want, have = tag.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(h, w) for h, w in zip(have[i:], want, strict=False))
        for i in range(len(have) - len(want) + 1)
    )


def _skipped(name: str, config: HqqConfig) -> str | None:
    return next((tag for tag in config.skip_modules if tag_matches(tag, name)), None)


def _choose(
    model: nn.Module, config: HqqConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[str, tuple[nn.Module, HqqConfig]], list[str]]:
    """Modules to quantize with their settings, and the names of weights that are quantized already."""
    tags = config.dynamic_config or {}
    by_tag = {tag: config.for_tag(tag) for tag in tags}
    default = config.for_tag(None)
    used: set[str] = set()
    chosen: dict[str, tuple[nn.Module, HqqConfig]] = {}
    already: list[str] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            continue
        matching = [tag for tag in tags if tag_matches(tag, name)]
        used.update(matching)
        accepted = filter_fn(module, name) if filter_fn is not None else isinstance(module, nn.Linear)
        named = matching and (accepted or (filter_fn is None and isinstance(module, nn.Embedding)))
        if not (accepted or named) or _skipped(name, config):
            continue
        settings = by_tag[max(matching, key=lambda t: (t.count("."), len(t)))] if matching else default
        if settings is None:
            continue
        if isinstance(weight, HQQTensor):
            already.append(name)
        elif "weight" not in module._parameters:
            raise TypeError(f"{name}: its weight is computed (parametrized), not a parameter; remove that first")
        else:
            chosen[name] = (module, settings)
    unused = [tag for tag in tags if tag not in used]
    if unused:
        raise ValueError(f"dynamic_config tags {unused} match no module with a weight of rank 2 or more")
    return chosen, already


def selected_weights(
    model: nn.Module, config: HqqConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, nn.Parameter]:
    """Dense weights that ``quantize_`` would take, by the name of the (first) module that has each."""
    chosen, _ = _choose(model, config, filter_fn)
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, (module, _) in chosen.items():
        weight = module.get_parameter("weight")
        found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def _users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


@register_quantize_module_handler(HqqConfig)
def _torchao_handler(module: nn.Module, config: HqqConfig, *, parameter_name: str = "weight") -> nn.Module:
    """torchao's ``quantize_`` and ``FqnToConfig`` call this; they pass no names, so tags cannot be applied."""
    if config.dynamic_config:
        raise ValueError("dynamic_config needs module names, which torchao's quantize_ does not pass; use hqqtensor's")
    old: Any = getattr(module, parameter_name)
    if isinstance(old, HQQTensor):
        return module
    settings = config.for_tag(None)
    assert settings is not None
    check_weight(old, settings, f"{type(module).__name__}.{parameter_name}")
    setattr(module, parameter_name, nn.Parameter(HQQTensor.from_hp(old, settings), requires_grad=False))
    show_quantized(module)
    return module
