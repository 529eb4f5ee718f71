"""What an HQQTensor must be: its attributes, and its data held against them.

Every HQQTensor is checked here once, when it is made: by the constructor, which views, ``__tensor_unflatten__`` and the
readers of files use, and by ``__setstate__``, which ``torch.load`` and pickle use. A check looks at shapes, dtypes and
devices, never at the numbers, and takes microseconds. Fakes of torch.compile whose sizes are symbols are let through:
to compare a symbol would pin it to one number.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqqtensor.config import ACTIVATIONS, META_NBITS, SCALE_DTYPES
from hqqtensor.formats import get_format
from hqqtensor.ops.checks import LARGEST
from hqqtensor.packing import meta_bytes, row_bytes
from hqqtensor.transforms import block_of

DTYPES = (*SCALE_DTYPES, torch.float64)
"""What a tensor may present and be stored as."""
MAX_NUMEL = 2**62
"""Bound on the number of weights: bytes and offsets then fit into 64 bits."""
_PLAIN = (Tensor, torch.nn.Parameter)


class Geometry(NamedTuple):
    """Stored ``[*lead, rows, columns]``. ``groups``: those of a row (axis 1), or the fewest a column has (axis 0)."""

    lead: tuple[int, ...]
    rows: int
    columns: int
    groups: int


def is_whole(value: object) -> bool:
    """Whether ``value`` is an integer, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_attributes(
    nbits: Any, group_size: Any, axis: Any, shape: Any, dtype: Any, format: Any, transposed: Any, activation: Any,
    row_dims: Any, rotation: Any,
) -> Geometry:  # fmt: skip
    """The geometry that the attributes of an HQQTensor describe; ValueError names the first that is not allowed."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(what)

    need(isinstance(format, str), f"format must be a name, got {format!r}")
    widths = get_format(format).widths
    good = is_whole(nbits) and nbits in widths
    need(good, f"nbits of format {format!r} must be one of {list(widths)}, got {nbits!r}")
    need(is_whole(axis) and axis in (0, 1), f"axis must be 0 or 1, got {axis!r}")
    good = is_whole(group_size) and 0 < group_size <= LARGEST
    need(good, f"group_size must be from 1 to {LARGEST}, got {group_size!r}")
    need(isinstance(transposed, bool), f"transposed must be True or False, got {transposed!r}")
    need(activation in ACTIVATIONS, f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    good = isinstance(shape, (tuple, list)) and 2 <= len(shape) <= 8
    good = good and all(is_whole(extent) and 0 <= extent <= LARGEST for extent in shape)
    need(good, f"shape must be 2 to 8 numbers from 0 to {LARGEST}, got {shape!r}")
    need(math.prod(max(extent, 1) for extent in shape) < MAX_NUMEL, f"shape {list(shape)} overflows")
    folds = is_whole(row_dims) and (row_dims == 1 or (row_dims == len(shape) - 1 and not transposed))
    need(folds, f"row_dims must be 1, or for a convolution {len(shape) - 1}, got {row_dims!r} for {list(shape)}")
    *lead, rows = shape[:-row_dims]
    columns = math.prod(shape[-row_dims:])
    if transposed:
        rows, columns = columns, rows
    good = is_whole(rotation) and (
        rotation == 0 or (rotation > 0 and rotation == block_of(rotation) and columns % rotation == 0)
    )
    need(good, f"rotation must be 0 or a power of two that divides {columns} in_features, got {rotation!r}")
    good = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    need(good, f"dtype must be a floating torch.dtype, got {dtype!r}")
    return Geometry(tuple(lead), rows, columns, -(-(columns if axis else rows) // group_size))


_cached = functools.lru_cache(maxsize=4096, typed=True)(check_attributes)


def check(
    qdata: Any, scale: Any, zero_point: Any, act_pre_scale: Any, nbits: Any, group_size: Any, axis: Any, shape: Any,
    dtype: Any, format: Any, *others: Any,
) -> None:  # fmt: skip
    """ValueError where these are not the parts of an HQQTensor, see its docstring; others as ``check_attributes``."""
    attributes = (nbits, group_size, axis, shape, dtype, format, *others)
    try:
        lead, rows, columns, groups = _cached(*attributes)
    except TypeError:  # something that has no hash: a symbol, a list, or no attribute at all
        if isinstance(shape, (tuple, list)) and any(isinstance(extent, torch.SymInt) for extent in shape):
            return
        lead, rows, columns, groups = check_attributes(*attributes)
    for name, part in (("qdata", qdata), ("scale", scale)):
        if not isinstance(part, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(part).__name__}")
    if type(qdata) not in _PLAIN and hasattr(qdata, "qdata"):
        raise ValueError(f"qdata must hold packed codes, got a quantized {type(qdata).__name__}")
    if _symbolic(qdata) or _symbolic(scale):
        return
    expected = (*lead, rows, groups)
    if axis == 0:
        # Row n belongs to group n % groups. A slice of rows keeps all groups, so that there may be more than the
        # rows need; that of the scale is the number that counts.
        size = _shape(scale)
        expected = (*lead, max(1, groups, size[-2] if len(size) > 1 else 0), columns)
    width, view = row_bytes(columns, nbits), qdata.dtype
    if view != torch.uint8 and view not in SCALE_DTYPES:
        raise ValueError(f"qdata must be uint8 or a view of it as {_names(SCALE_DTYPES)}, got {view}")
    if qdata.shape != (*lead, rows, width // view.itemsize) or width % view.itemsize:
        # Quantized scales and zero points are HQQTensors too, and their rows are not filled up to eight codes.
        short = axis == 0 and format == "int" and nbits in META_NBITS and view == torch.uint8
        if not short or qdata.shape != (*lead, rows, meta_bytes(columns, nbits)):
            raise ValueError(f"qdata must be {[*lead, rows, width]} bytes, got {list(qdata.shape)} {view}")
    if view != torch.uint8 and qdata.stride(-1) != 1:
        raise ValueError(f"qdata viewed as {view} must have its rows in one piece, got strides {qdata.stride()}")
    _check_numbers("scale", scale, expected, qdata.device)
    fmt = get_format(format)
    if fmt.learned:
        entries = _shape(zero_point)[-2:-1] if isinstance(zero_point, Tensor) else ()
        expected = (*lead, rows if entries == (rows,) else 1, 2**nbits)
        _check_plain("zero_point", zero_point, expected, qdata.device)
    elif fmt.has_zero_point:
        _check_numbers("zero_point", zero_point, expected, qdata.device)
    elif zero_point is not None:
        raise ValueError(f"format {format!r} has no zero_point")
    if act_pre_scale is not None:
        _check_plain("act_pre_scale", act_pre_scale, (columns,), qdata.device)


def check_quantized(
    nbits: int, axis: int, format: str, transposed: bool, row_dims: int, rotation: int, name: str = "scale"
) -> None:
    """ValueError where an HQQTensor with these attributes cannot be the scale or zero point of another."""
    if nbits not in META_NBITS or (axis, format, transposed, row_dims, rotation) != (0, "int", False, 1, 0):
        raise ValueError(f"{name}: quantized scales and zero points are integers of 8 or 4 bits, axis 0")


def _check_numbers(name: str, part: Any, expected: tuple[int, ...], device: torch.device) -> None:
    """Scales or zero points, plain or quantized."""
    if type(part) in _PLAIN:
        return _check_plain(name, part, expected, device)
    from hqqtensor.tensor import HQQTensor  # which imports this module

    if not isinstance(part, HQQTensor):
        return _check_plain(name, part, expected, device)
    check_quantized(part.nbits, part.axis, part.format, part.transposed, part.row_dims, part.rotation, name)
    if part.nested or part.act_pre_scale is not None:
        raise ValueError(f"{name}: quantized scales and zero points are no further quantized or scaled")
    packed = (*expected[:-1], meta_bytes(expected[-1], part.nbits))
    if _shape(part) != expected or part.qdata.shape != packed or part.qdata.dtype != torch.uint8:
        raise ValueError(
            f"{name}: quantized as {list(expected)} it must have {list(packed)} bytes, "
            f"got {list(_shape(part))} in {list(part.qdata.shape)} {part.qdata.dtype}"
        )
    if part.qdata.device != device:
        raise ValueError(f"{name} must be on {device} as qdata is, got {part.qdata.device}")


def _check_plain(name: str, part: Any, expected: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(part, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(part).__name__}")
    if part.dtype not in SCALE_DTYPES or part.shape != expected or part.layout is not torch.strided:
        raise ValueError(
            f"{name} must be {list(expected)} of {_names(SCALE_DTYPES)}, got {list(part.shape)} {part.dtype}"
        )
    if part.device != device:
        raise ValueError(f"{name} must be on {device} as qdata is, got {part.device}")


def _shape(part: Any) -> tuple[int, ...]:
    """Without torch's function dispatch, which a quantized tensor's own ``shape`` goes through."""
    if type(part) not in _PLAIN and hasattr(part, "in_features"):
        return (*part.qdata.shape[:-1], part.in_features)
    return part.shape


def _symbolic(part: Any) -> bool:
    return type((part if type(part) in _PLAIN else getattr(part, "qdata", part)).numel()) is not int


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
