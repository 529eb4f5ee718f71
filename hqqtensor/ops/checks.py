"""What the operators rely on, checked before any memory is read: shapes, dtypes, devices, settings.

The fake kernels and the backends of the registry are checked here, the compiled kernels in ``kernels/cpu/torch``, which
give the same messages.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops.packed import PackedWeight
from hqqtensor.packing import meta_bytes, row_bytes

LARGEST = 1 << 40
"""Of in_features and group_size: far beyond any weight, and small enough that no count made of it overflows."""

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def _about(t: Tensor | None) -> str:
    return "none" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _check(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise RuntimeError(message())


def _device(t: Tensor, name: str, qdata: Tensor) -> None:
    _check(t.device == qdata.device, lambda: f"{name} is on {t.device}, qdata on {qdata.device}")


def _values(w: PackedWeight, t: Tensor, name: str, rows: Any, columns: int, used: int) -> int:
    """Check scales or zero points; returns how many tensors of meta are used after them."""
    lead = list(w.qdata.shape[:-2])
    plain, nibbles = [*lead, rows, columns], [*lead, rows, meta_bytes(columns, 4)]
    quantized, shape = t.dtype == torch.uint8, list(t.shape)
    _check(
        (shape == plain and (quantized or t.dtype in FLOATING)) or (quantized and shape == nibbles),
        lambda: f"{name} must be floating-point {plain}, or uint8 {plain} or {nibbles}, got {_about(t)}",
    )
    _device(t, name, w.qdata)
    if not quantized:
        return used
    meta = w.meta or ()
    _check(
        len(meta) >= used + 2,
        lambda: (
            "meta must begin with a scale and a zero point of the uint8 scale, then those of the uint8 "
            f"zero_point; got {len(meta)} tensors"
        ),
    )
    for i in (used, used + 1):
        inner = meta[i]
        count = inner.shape[-2] if inner.ndim >= 2 else 0
        _check(
            inner.dtype in FLOATING and count >= 1 and list(inner.shape) == [*lead, count, columns],
            lambda i=i, inner=inner: (
                f"meta[{i}] must be floating-point {[*lead, 1, columns]} or with more rows, "  # type: ignore[misc]
                f"got {_about(inner)}"
            ),
        )
        _device(inner, f"meta[{i}]", w.qdata)
    _check(
        meta[used].shape == meta[used + 1].shape,
        lambda: (
            "meta must have a scale and a zero point of one shape, got "
            f"{_about(meta[used])} and {_about(meta[used + 1])}"
        ),
    )
    return used + 2


def _table(w: PackedWeight) -> None:
    """Check the zero point of a format that has none, or the entries of its codebook."""
    fmt, zero = get_format(w.format), w.zero_point
    if not fmt.learned:
        _check(zero is None, lambda: f"format '{w.format}' has no zero_point, got {_about(zero)}")
        return
    entries = 2**w.nbits
    one = [*w.qdata.shape[:-2], 1, entries]
    each = [*w.qdata.shape[:-1], entries]
    _check(
        zero is not None and zero.dtype in FLOATING and list(zero.shape) in ([entries], [1, entries], one, each),
        lambda: f"a codebook must be floating-point {[entries]}, {one} or {each}, got {_about(zero)}",
    )
    _device(zero, "zero_point", w.qdata)  # type: ignore[arg-type]


def check_packed(w: PackedWeight, rank: int = 0) -> None:
    """Raise RuntimeError where a packed weight's tensors and settings do not fit one another.

    rank: what qdata must have, 0 for any from 2 on. ValueError for a format that is not registered or lacks this width.
    """
    _check(1 <= w.nbits <= 8, lambda: f"nbits must be 1 to 8, got {w.nbits}")
    _check(w.axis in (0, 1), lambda: f"axis must be 0 or 1, got {w.axis}")
    _check(1 <= w.group_size <= LARGEST, lambda: f"group_size must be 1 to {LARGEST}, got {w.group_size}")
    _check(1 <= w.in_features <= LARGEST, lambda: f"in_features must be 1 to {LARGEST}, got {w.in_features}")
    fmt = get_format(w.format)
    if w.nbits not in fmt.widths:
        raise ValueError(f"format {w.format!r} has {list(fmt.widths)} bits, got {w.nbits}")
    q, K, bytes_ = w.qdata, w.in_features, row_bytes(w.in_features, w.nbits)
    lead = {0: "..., ", 2: "", 3: "E, "}[rank]
    _check(
        (q.ndim == rank if rank else q.ndim >= 2) and q.shape[-1] == bytes_ and q.dtype == torch.uint8,
        lambda: f"qdata must be uint8 [{lead}N, {bytes_}], got {_about(q)}",
    )
    # A slice of rows keeps the groups of an axis-0 weight: there the number of groups is that of the scale's rows.
    own = w.axis == 0 and w.scale.ndim >= 2 and w.scale.shape[-2] >= 1
    groups = -(-(K if w.axis == 1 else max(q.shape[-2], 1)) // w.group_size) if not own else w.scale.shape[-2]
    rows, columns = (q.shape[-2], groups) if w.axis == 1 else (groups, K)
    used = _values(w, w.scale, "scale", rows, columns, 0)
    if fmt.has_zero_point:
        _check(w.zero_point is not None, lambda: f"format '{w.format}' needs a zero_point, got none")
        used = _values(w, w.zero_point, "zero_point", rows, columns, used)  # type: ignore[arg-type]
    else:
        _table(w)
    _check(
        len(w.meta or ()) == used,
        lambda: (
            f"meta must have {used} tensors, a scale and a zero point for each of scale and zero_point that is "
            f"uint8; got {len(w.meta or ())}"
        ),
    )


def _vector(t: Tensor | None, name: str, size: Any, qdata: Tensor) -> None:
    if t is None:
        return
    fits = t.ndim == 1 and t.shape[0] == size and t.dtype in FLOATING
    _check(fits, lambda: f"{name} must be floating-point [{size}], got {_about(t)}")
    _device(t, name, qdata)


def _input(op: str, x: Tensor, w: PackedWeight, lead: str, rank: int = 0) -> None:
    fits = (x.ndim == rank if rank else x.ndim >= 1) and x.shape[-1] == w.in_features and x.dtype in FLOATING
    _check(fits, lambda: f"{op}: input must be floating-point [{lead}, {w.in_features}], got {_about(x)}")
    _device(x, "input", w.qdata)


def _activation(name: str) -> None:
    names = ("float", "exact", "high", "int8")
    _check(name in names, lambda: f"activation must be 'float', 'exact', 'high' or 'int8', got '{name}'")


def _floating(dtype: torch.dtype) -> None:
    _check(dtype in FLOATING, lambda: f"dtype must be one of {[str(d) for d in FLOATING]}, got {dtype}")


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, act_pre_scale: Tensor | None, activation: str) -> None:
    _activation(activation)
    check_packed(w, 2)
    _input("linear", x, w, "...")
    _vector(bias, "bias", w.qdata.shape[-2], w.qdata)
    _vector(act_pre_scale, "act_pre_scale", w.in_features, w.qdata)


def linear_many(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], activation: str,
    act_pre_scales: Sequence[Tensor | None],
) -> None:  # fmt: skip
    _activation(activation)
    for w, bias, act_pre_scale in zip(weights, biases, act_pre_scales, strict=True):
        check_packed(w, 2)
        _vector(bias, "bias", w.qdata.shape[-2], w.qdata)
        _vector(act_pre_scale, "act_pre_scale", w.in_features, w.qdata)
    _input("linear_many", x, weights[0], "...")


def batched_linear(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> None:
    _activation(activation)
    check_packed(w, 3)
    _input("batched_linear", x, w, "E, M", 3)
    experts = w.qdata.shape[0]
    _check(x.shape[0] == experts, lambda: f"batched_linear: input {_about(x)} does not fit {experts} weights")
    _vector(act_pre_scale, "act_pre_scale", w.in_features, w.qdata)


def grouped_linear(x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> None:
    _activation(activation)
    check_packed(w, 3)
    _input("grouped_linear", x, w, "S", 2)
    experts = w.qdata.shape[0]
    fits = offsets.ndim == 1 and offsets.shape[0] == experts and offsets.dtype in INTEGERS
    _check(fits, lambda: f"grouped_linear: offsets must be integers [{experts}], got {_about(offsets)}")
    _device(offsets, "offsets", w.qdata)
    _vector(act_pre_scale, "act_pre_scale", w.in_features, w.qdata)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> None:
    _floating(dtype)
    check_packed(w)


def dequantize_into(out: Tensor, w: PackedWeight) -> None:
    _floating(out.dtype)
    check_packed(w)
    want = [*w.qdata.shape[:-1], w.in_features]
    beside = out.ndim >= 1 and (out.stride(-1) == 1 or want[-1] == 1)
    _check(
        list(out.shape) == want and beside and _no_overlap(out),
        lambda: (
            f"dequantize: out must be {want} with the numbers of a row beside each other and none sharing memory, "
            f"got {_about(out)}, strides {list(out.stride())}"
        ),
    )
    _device(out, "out", w.qdata)


def _no_overlap(t: Tensor) -> bool:
    """Whether each dimension steps over all that those of smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)) if t.numel() else ():
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def embedding(indices: Tensor, w: PackedWeight, dtype: torch.dtype) -> None:
    _floating(dtype)
    check_packed(w, 2)
    _check(indices.dtype in INTEGERS, lambda: f"embedding: indices must be integers, got {_about(indices)}")
    _device(indices, "indices", w.qdata)
