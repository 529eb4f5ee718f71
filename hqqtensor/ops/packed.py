"""What every operator takes of a packed weight, as one tuple, and its place among an operator's arguments."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class PackedWeight(NamedTuple):
    """A packed weight ``[..., N, K]`` as the operators see it: plain tensors and settings, no HQQTensor.

    qdata, scale, zero_point: as in ``HQQTensor``, where an HQQTensor as scale or zero point stands as its uint8 qdata.
    meta: the second level, a scale and a zero point for each uint8 ``scale`` and ``zero_point``, in this order,
        floating-point ``[..., rows, columns]``: row r of the first level uses row r % rows of the second. None or empty
        where there is no second level. The width of a uint8 row tells its bits: ``columns`` bytes are 8 bits each,
        ``meta_bytes(columns, 4)`` bytes 4 bits (``hqqtensor.packing.pack_meta``).
    nbits, format, group_size, axis, in_features: as in ``HQQTensor``.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    meta: Sequence[Tensor] | None
    nbits: int
    format: str
    group_size: int
    axis: int
    in_features: int


def expert(w: PackedWeight, index: int | slice) -> PackedWeight:
    """One weight of a stack, or some; a codebook without a leading dimension is one for all."""
    zero = w.zero_point if w.zero_point is None or w.zero_point.ndim < 3 else w.zero_point[index]
    meta = [t[index] for t in w.meta or ()]
    return w._replace(qdata=w.qdata[index], scale=w.scale[index], zero_point=zero, meta=meta)


LAYOUTS = {
    "linear": (1, 2),
    "batched_linear": (1, 1),
    "grouped_linear": (2, 1),
    "dequantize": (0, 0),
    "dequantize_into": (1, 0),
    "embedding": (1, 0),
}
"""Arguments of an operator before the weight, and those (bias, act_pre_scale) between its zero_point and its meta."""


def flat(op: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the schema, from arguments with the weight as one PackedWeight."""
    before, between = LAYOUTS[op]
    weight, rest = args[before], args[before + 1 :]
    return (*args[:before], *weight[:3], *rest[:between], *weight[3:], *rest[between:])


def structured(op: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The reverse of ``flat``: (what comes before the weight, the weight, what stood between, what comes after)."""
    before, between = LAYOUTS[op]
    meta = before + 3 + between
    weight = PackedWeight(*args[before : before + 3], *args[meta : meta + 6])
    return (*args[:before], weight, *args[before + 3 : meta], *args[meta + 6 :])
