"""What ``quantize_`` does with a calibration: it goes from layer to layer, the ones before quantized already."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hqqtensor.calibration.build import check_calibrated, from_calibrated
from hqqtensor.calibration.collect import Calibration
from hqqtensor.calibration.inputs import watch
from hqqtensor.selection import Choice


def check_plan(choices: Sequence[Choice], calibration: Calibration) -> None:
    """ValueError naming the layer for settings that calibration does not serve, or inputs of another size."""
    for choice in choices:
        full, weight = _calibrated_name(choice, calibration), choice.weight
        name = _module(full)
        if name in calibration.moments:
            check_calibrated(choice.settings, full, calibration.mode)
            if len(calibration.moments[name]) != weight.shape[-1]:
                raise ValueError(
                    f"{full}: calibrated on {len(calibration.moments[name])} inputs, the weight has "
                    f"{weight.shape[-1]}; calibrate this model"
                )
    if not any(_module(_calibrated_name(choice, calibration)) in calibration.moments for choice in choices):
        raise ValueError("the calibration has none of the layers to quantize; calibrate this model")


def quantize_calibrated(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Calibration,
    done: Callable[[nn.Parameter, str], None],
) -> dict[int, nn.Parameter]:
    """The quantized weights of the calibrated layers of ``choices``, by id of the dense ones.

    done(weight, name): called after each. In mode "full" the batches run once for each stage (layers with a common
    input), in a model whose earlier stages are quantized already, and one ``[K, K]`` matrix is in memory at a time. The
    model is left as it was, whatever ends the work. ValueError naming the layer where its scales cannot be stored.
    """
    by_module = {_module(_calibrated_name(choice, calibration)): choice for choice in choices}
    quantized_by_id: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for stage in calibration.stages:
            names = [name for name in stage if name in by_module]
            if not names:
                continue
            full_moments = None
            if calibration.mode == "full":
                full_moments = _second_moments(model, names[0], calibration)
            for name in names:
                full, weight = _calibrated_name(by_module[name], calibration), by_module[name].weight
                moments = calibration.moments[name] if full_moments is None else full_moments
                try:
                    quantized = from_calibrated(weight, by_module[name].settings, moments.to(weight.device))
                except ValueError as error:
                    raise ValueError(f"{full}: {error}") from None
                quantized_by_id[id(weight)] = nn.Parameter(quantized, requires_grad=False)
                if calibration.mode == "full":
                    module = model.get_submodule(name)
                    replaced.append((module, weight))
                    module._parameters["weight"] = quantized_by_id[id(weight)]
                done(weight, full)
    finally:
        for module, weight in replaced:
            module._parameters["weight"] = weight
    return quantized_by_id


def _second_moments(model: nn.Module, name: str, calibration: Calibration) -> Tensor:
    """Mean of x x^T, float32 ``[K, K]``, over the inputs of ``name`` in the model as it is now."""
    size = len(calibration.moments[name])
    total: Tensor | None = None
    count = 0

    def add(_name: str, x: Tensor) -> None:
        nonlocal total, count
        if total is None:
            total = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        x = x.to(torch.float32)
        total.addmm_(x.T, x)
        count += len(x)

    watch(model, [name], calibration.batches, add, stop=calibration.called_once)
    assert total is not None
    return total / max(1, count)


def _calibrated_name(choice: Choice, calibration: Calibration) -> str:
    """The weight's name in a module that was calibrated, else its first: a tied embedding may come before lm_head."""
    return next((name for name in choice.names if _module(name) in calibration.moments), choice.names[0])


def _module(full: str) -> str:
    return full.rpartition(".")[0]
