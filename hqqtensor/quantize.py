"""quantize_ and dequantize_: choose the weights, check all of them, encode all of them, then swap them in."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from hqqtensor.config import HqqConfig
from hqqtensor.encode import check_weight
from hqqtensor.parameters import QuantizedExtraRepr as QuantizedExtraRepr  # models pickled before have it from here
from hqqtensor.parameters import replace_parameters, show_quantized
from hqqtensor.selection import Choice, choose, counting, row_dims
from hqqtensor.tensor import HQQTensor

if TYPE_CHECKING:
    from hqqtensor.calibration import Calibration
    from hqqtensor.calibration.data import Source
    from hqqtensor.calibration.resume import ResumeFolder

QUALITIES = {"fast": "diagonal", "good": "full", "best": "trained"}
"""Mode of calibration for each ``quality``."""
PHASES = ("writing text", "calibrating")
"""Names under which the progress of what comes before quantizing is reported."""


def quantize_(
    model: nn.Module,
    config: HqqConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    calibration: "Calibration | Source | None" = None,
    quality: str | None = None,
    tokenizer: Any = None,
    resume: str | os.PathLike[str] | None = None,
) -> None:
    """Replace weights of ``model`` by HQQTensors, in place; every module stays the class it was.

    Chosen are the ``nn.Linear`` modules, transformers' ``Conv1D`` and 3-D expert weights (or the modules that
    ``filter_fn(module, name)`` accepts), and embeddings and convolutions that a ``dynamic_config`` tag names, less
    ``skip_modules``; with ``config.embedding_nbits`` the input embedding and the output layer too.
    All checks come first and all new weights are made before the first is swapped in, so that an error leaves the
    model as it was. Tied weights are quantized once and stay tied. Weights that are quantized already are left
    alone with a warning. ``device``: where to quantize and where the whole model is afterwards.
    ``progress(done, total, name)``: called after each weight (each expert of a stack where there is a calibration);
    done and total are numbers of elements. Before that it counts the phases of calibrating under the names of
    ``PHASES``: the tokens of each text that the model writes, and the batches of the first pass.
    ``calibration``: from ``hqqtensor.calibration.calibrate``, or what to calibrate on: "self" (text that the model
    writes itself), "random" (random tokens), the path of a text file (needs ``tokenizer``), or batches. Layers that it
    has not seen are quantized without.
    ``quality``: "fast" looks at the weights alone, or weighs columns where there is a calibration; "good" feeds errors
    back, block by block; "best" also learns how weights are rounded, which takes minutes where the others take seconds.
    None is "good" with a calibration and "fast" without one. "good" and "best" without one take "self", or "random" for
    a model that cannot write.
    ``resume``: a folder for what calibration has finished. After an interrupt or a kill the same call goes on from
    there and gives the same weights, bit for bit. It holds the quantized weights and the hidden states of the tokens,
    and is emptied at the end, with a warning where that fails. ValueError where it holds the run of another call.

    Raises TypeError or ValueError naming the module: bad weight, tag that matches nothing, nothing to quantize.
    """
    if not isinstance(config, HqqConfig):
        raise TypeError(f"config must be an HqqConfig, got {type(config).__name__}")
    if quality is not None and quality not in QUALITIES:
        raise ValueError(f"quality must be one of {list(QUALITIES)} or None, got {quality!r}")
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
    kept = None if resume is None else _folder(resume, model, config, choices)
    calibration = _calibration(model, calibration, quality, tokenizer, progress, kept)
    replace_parameters(model, _quantized_by_id(model, choices, device, progress, calibration, kept))
    if device is not None:
        model.to(device)
    if kept is not None and kept is not resume:
        try:
            kept.empty()
        except OSError as error:
            warnings.warn(f"the model is quantized, but {kept.path} could not be emptied: {error}", stacklevel=2)


def _folder(
    resume: str | os.PathLike[str], model: nn.Module, config: HqqConfig, choices: list[Choice]
) -> "ResumeFolder":
    from hqqtensor.calibration.resume import ResumeFolder  # costly to import, and seldom used

    folder = resume if isinstance(resume, ResumeFolder) else ResumeFolder(resume)
    folder.describe(model, config.to_dict(), [choice.names[0] for choice in choices])
    return folder


def _calibration(
    model: nn.Module, calibration: "Calibration | Source | None", quality: str | None, tokenizer: Any,
    progress: Callable[[int, int, str], None] | None, kept: "ResumeFolder | None",
) -> "Calibration | None":  # fmt: skip
    """What the arguments of ``quantize_`` ask for."""
    if calibration is None and quality in (None, "fast"):
        if kept is not None:
            raise ValueError('resume is for calibration: give calibration or quality "good" or "best" too')
        return None
    from hqqtensor.calibration import Calibration, calibrate  # costly to import, and seldom used
    from hqqtensor.calibration.data import writes_text
    from hqqtensor.calibration.resume import calibrated

    mode = QUALITIES[quality or "good"]
    if isinstance(calibration, Calibration):
        mode = calibration.mode if quality is None else mode
    elif calibration is None:
        calibration = "self" if writes_text(model) else "random"
    if kept is not None:
        return calibrated(model, calibration, mode, tokenizer, progress, kept)
    if isinstance(calibration, Calibration):
        return dataclasses.replace(calibration, mode=mode)
    return calibrate(model, calibration, mode, progress, tokenizer)


def _quantized_by_id(
    model: nn.Module, choices: list[Choice], device: torch.device | str | None,
    progress: Callable[[int, int, str], None] | None, calibration: "Calibration | None", kept: "ResumeFolder | None",
) -> dict[int, nn.Parameter]:  # fmt: skip
    """The quantized parameter of each choice, by the id of the dense one; the model is left as it was."""
    report = counting(choices, progress)
    quantized: dict[int, nn.Parameter] = {}
    if calibration is not None:
        from hqqtensor.calibration.apply import check_plan, quantize_calibrated  # costly to import, and seldom used

        check_plan(choices, calibration)
        quantized = quantize_calibrated(model, choices, calibration, report, kept)
    for choice in choices:
        weight, name = choice.weight, choice.names[0]
        if id(weight) in quantized:
            continue
        try:
            quantized[id(weight)] = choice.quantize(weight if device is None else weight.to(device))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        report(weight.numel(), name)
    return quantized


def dequantize_(model: nn.Module) -> None:
    """Replace every HQQTensor of ``model`` by the dense weight it stands for, in place; ties are kept."""
    dense_by_id = {
        id(parameter): nn.Parameter(parameter.dequantize(), requires_grad=False)
        for parameter in model.parameters()
        if isinstance(parameter, HQQTensor)
    }
    replace_parameters(model, dense_by_id)


def check_without_names(config: HqqConfig) -> None:
    """ValueError for settings by the name of a module, which torchao's ``quantize_`` does not pass on."""
    if config.embedding_nbits is not None:
        raise ValueError(
            f"embedding_nbits {config.embedding_nbits} needs the whole model, which torchao's quantize_ does not pass; "
            "use hqqtensor's, or leave it out"
        )
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
    weight_row_dims = row_dims(module) if parameter_name == "weight" else 1
    check_weight(old, settings, f"{type(module).__name__}.{parameter_name}", weight_row_dims)
    quantized = HQQTensor.from_hp(old, settings, weight_row_dims)
    setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
    show_quantized(module)
    return module
