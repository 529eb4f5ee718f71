"""What a weight will be once it is quantized, without its numbers: an HQQTensor on the meta device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.packing import meta_bytes, row_bytes
from hqqtensor.selection import Choice
from hqqtensor.solvers import column_scaled
from hqqtensor.stored_size import META_GROUP, codebook_dtype, meta_width, scale_shape
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import block_of

GUESS, OTHER = torch.float16, torch.float32
"""The dtype that plain scales are expected in where the settings leave it to the numbers, and the one that the few
weights take whose scales do not fit into it."""


def template(choice: Choice, dtype: torch.dtype, scale_dtype: torch.dtype = GUESS) -> HQQTensor:
    """The tensor that ``choice.quantize`` gives for a weight of ``dtype``: attributes, shapes and dtypes of its data.

    scale_dtype: of plain scales and zero points, where the settings leave it to the numbers.
    """
    settings, fmt = choice.settings, get_format(choice.settings.format)
    *lead, rows, columns = choice.matrix_shape()
    groups = (*lead, *scale_shape(rows, columns, settings))
    scale_dtype = settings.scale_dtype or scale_dtype
    qdata = _empty((*lead, rows, row_bytes(columns, settings.nbits)), torch.uint8)
    zero_point = None
    if fmt.learned:
        entries = (*lead, rows if settings.codebook == "row" else 1, 2**settings.nbits)
        zero_point = _empty(entries, codebook_dtype(settings))
    elif fmt.has_zero_point:
        zero_point = _of_groups(groups, settings.zero_nbits, scale_dtype)
    is_scaled = settings.solver == column_scaled.NAME or settings.rotation
    out = HQQTensor(
        qdata.view(dtype) if settings.view_as_float else qdata,
        _of_groups(groups, settings.scale_nbits, scale_dtype),
        settings.nbits,
        settings.group_size or (columns if settings.axis == 1 else rows),
        settings.axis,
        (*lead, rows, columns),
        settings.compute_dtype or dtype,
        settings.format,
        activation=settings.activation,
        rotation=block_of(columns) if settings.rotation else 0,
        zero_point=zero_point,
        act_pre_scale=_empty((columns,), torch.float16) if is_scaled else None,
    )
    if choice.row_dims > 1:
        out = out.with_data(shape=choice.weight.shape, row_dims=choice.row_dims)
    return out.transpose(-1, -2) if choice.transposed else out  # type: ignore[return-value]


def rows_are_independent(choice: Choice) -> bool:
    """Whether rows (or experts) can be quantized apart: nothing but the dtype of scales looks at all of them."""
    settings = choice.settings
    return (
        settings.axis == 1
        and settings.solver in ("hqq_joint", "rtn")
        and settings.scale_dtype is None
        and not (settings.quant_scale or settings.quant_zero or settings.rotation or settings.integer_zero)
        and not get_format(settings.format).learned
        and not choice.transposed
        and choice.row_dims == 1
    )


def _of_groups(shape: Sequence[int], nbits: int | None, dtype: torch.dtype) -> Tensor:
    """Scales or zero points ``[..., rows, columns]``, plain or quantized."""
    if nbits is None:
        return _empty(shape, dtype)
    *lead, rows, columns = shape
    nbits, size = meta_width(nbits, columns), min(META_GROUP, rows)
    meta = (*lead, -(-rows // size), columns)
    qdata = _empty((*lead, rows, meta_bytes(columns, nbits)), torch.uint8)
    numbers = [_empty(meta, torch.float32) for _ in range(2)]
    return HQQTensor(qdata, numbers[0], nbits, size, 0, tuple(shape), torch.float32, zero_point=numbers[1])


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
