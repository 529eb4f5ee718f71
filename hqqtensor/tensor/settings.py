"""The ``HqqConfig`` that quantized weights show."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from hqqtensor.config import HqqConfig
from hqqtensor.tensor import HQQTensor


def config_of(weight: HQQTensor) -> HqqConfig:
    """A config with the settings that ``weight`` shows, and the default solver, which a weight does not show."""
    scale, zero = weight.scale, weight.zero_point
    widths = [t.nbits for t in (scale, zero) if isinstance(t, HQQTensor)]
    plain = [t.dtype for t in (scale, zero) if t is not None and not isinstance(t, HQQTensor)]
    has_plain_zero = weight.format == "int" and type(zero) is Tensor and zero.device.type != "meta"
    return HqqConfig(
        nbits=weight.nbits,
        group_size=weight.group_size,
        axis=weight.axis,
        format=weight.format,
        scale_dtype=plain[0] if plain else None,
        quant_scale=isinstance(scale, HQQTensor),
        quant_zero=isinstance(zero, HQQTensor),
        meta_nbits=min(widths, default=8),
        compute_dtype=weight.dtype,
        activation=weight.activation,
        codebook=weight.codebook or "tensor",
        integer_zero=has_plain_zero and torch.equal(zero, zero.round()),  # type: ignore[arg-type, union-attr]
        view_as_float=weight.qdata.dtype != torch.uint8,
        rotation=weight.rotation > 0,
    )


def common_config(weights: Iterable[HQQTensor]) -> HqqConfig:
    """``config_of`` the first weight with the bits, group size, axis and format that most numbers are stored in.

    ValueError if there is no weight.
    """
    numbers: Counter[tuple[int, int, int, str]] = Counter()
    first: dict[tuple[int, int, int, str], HQQTensor] = {}
    for weight in weights:
        settings = (weight.nbits, weight.group_size, weight.axis, weight.format)
        numbers[settings] += weight.numel()
        first.setdefault(settings, weight)
    if not first:
        raise ValueError("there is no quantized weight to take settings from")
    return config_of(first[numbers.most_common(1)[0][0]])
