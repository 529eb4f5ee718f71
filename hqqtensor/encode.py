"""From a weight to packed codes, scale and zero point: solver, rounding for storage, codes, packing."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqqtensor.config import HqqConfig
from hqqtensor.formats import Levels, get_format
from hqqtensor.kernels import cpu, triton
from hqqtensor.ops.backend import serves
from hqqtensor.ops.reference import dequantize, expand_groups
from hqqtensor.packing import meta_bytes, pack, row_bytes
from hqqtensor.solvers import Solution, column_scaled, get_solver
from hqqtensor.solvers.base import CHUNK, SolverOptions
from hqqtensor.solvers.coarse_zero import is_coarse, refit
from hqqtensor.solvers.codebook import TORCH_PASSES, Passes, learn
from hqqtensor.transforms import check_rotation

META_GROUP = 128
"""Scales (or zero points) that share a scale and zero point of their own under quant_scale and quant_zero."""


@dataclass(frozen=True)
class Encoded:
    """``qdata`` uint8 ``[..., N, row_bytes]``; ``scale``, ``zero_point`` plain, or themselves encoded.

    ``zero_point`` is None for formats without one; for a learned codebook it holds the entries.
    """

    qdata: Tensor
    scale: "Tensor | Encoded"
    zero_point: "Tensor | Encoded | None"
    nbits: int
    group_size: int
    axis: int
    shape: torch.Size


def check_weight(weight: Tensor, config: HqqConfig, name: str = "weight", row_dims: int = 1) -> None:
    """Raise TypeError or ValueError, naming ``name``, if ``config`` cannot quantize ``weight``.

    ``row_dims``: as in ``HQQTensor``.
    """
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{name}: expected a plain dense tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: weights must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"{name}: weights must have rank 2 or more and not be empty, got shape {list(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError(f"{name}: is on the meta device and holds no numbers; load the weights first")
    if not 0 < row_dims < weight.ndim or (row_dims > 1 and row_dims != weight.ndim - 1):
        raise ValueError(f"{name}: row_dims must be 1 or {weight.ndim - 1} for a weight of rank {weight.ndim}")
    if row_dims > 1:
        if config.activation != "float":
            raise ValueError(
                f"{name}: a convolution runs on dequantized weights and takes its inputs as they are; "
                f'activation {config.activation!r} does nothing there, set activation "float" for it'
            )
        weight = weight.detach().flatten(-row_dims)
    extent = weight.shape[-1] if config.axis == 1 else weight.shape[-2]
    if config.group_size is not None and config.group_size > extent:
        side = "in_features" if config.axis == 1 else "out_features"
        raise ValueError(
            f"{name}: group_size {config.group_size} is larger than {side} {extent} (axis {config.axis}); "
            f"allowed are 1 to {extent}, or None for one group"
        )
    if config.rotation:
        check_rotation(weight.shape[-1], name)
    if config.view_as_float and row_bytes(weight.shape[-1], config.nbits) % weight.element_size():
        raise ValueError(
            f"{name}: view_as_float needs packed rows of a multiple of {weight.element_size()} bytes, "
            f"got {row_bytes(weight.shape[-1], config.nbits)} ({config.nbits} bits, in_features {weight.shape[-1]})"
        )
    if not _finite(weight.detach()):
        raise ValueError(f"{name}: holds NaN or Inf; quantization needs finite weights")


def encode(weight: Tensor, config: HqqConfig) -> Encoded:
    """Quantize a checked weight ``[..., N, K]``; see ``check_weight`` for what is refused."""
    weight = weight.detach()
    extent = weight.shape[-1] if config.axis == 1 else weight.shape[-2]
    group_size = config.group_size or extent
    *lead, out_features, in_features = weight.shape
    fmt = get_format(config.format)
    shape = [*lead, *scale_shape(out_features, in_features, config)]
    if config.axis == 1 and not fmt.learned:
        matrices = [weight.reshape(-1, in_features)]
    else:
        matrices = list(weight.reshape(-1, out_features, in_features))
    solutions = [_solve(matrix, group_size, config) for matrix in matrices]
    inverse = torch.stack([s.inverse_scale for s in solutions]).reshape(shape)
    zeros = [s.zero_point for s in solutions if s.zero_point is not None]
    zero_shape = [*lead, -1, zeros[0].shape[-1]] if fmt.learned else shape
    zero_point = torch.stack(zeros).reshape(zero_shape) if zeros else None
    scale = inverse.reciprocal()
    dtype = config.scale_dtype or _storage_dtype(scale, zero_point if fmt.has_zero_point else None)
    stored_scale, seen_scale = _store(scale, dtype, config.scale_nbits, "scale")
    stored_zero: Tensor | Encoded | None = None
    seen_zero = zero_point
    if zero_point is not None and fmt.learned:
        stored_zero = zero_point.to(codebook_dtype(config))
    elif zero_point is not None:
        stored_zero, seen_zero = _store(zero_point, dtype, config.zero_nbits, "zero_point")
    if not solutions[0].exact_encode:
        # A scale that rounding or few bits made zero can reach nothing but zero itself, whatever the code.
        inverse, zero_point = torch.where(seen_scale == 0, 0.0, seen_scale.reciprocal()), seen_zero
    size = (*lead, out_features, row_bytes(in_features, config.nbits))
    on_cpu = weight.device.type == "cpu"
    qdata = cpu.empty_packed(*size) if on_cpu else weight.new_empty(size, dtype=torch.uint8)
    many = len(matrices)
    rows = qdata.reshape(many, -1, qdata.shape[-1])
    split = [[None] * many if t is None else t.reshape(many, -1, t.shape[-1]) for t in (inverse, zero_point)]
    for matrix, inv, zero, out in zip(matrices, *split, rows, strict=True):
        if serves("triton", matrix.device.type) and config.format == "int" and zero is not None:
            triton.pack_codes(out, matrix, inv, zero, config.nbits, group_size, config.axis)
        else:
            _assign(matrix, inv, zero, out, group_size, config)
    return Encoded(qdata, stored_scale, stored_zero, config.nbits, group_size, config.axis, weight.shape)


def stored_bytes(shape: Sequence[int], config: HqqConfig, scale_dtype: torch.dtype = torch.float16) -> int:
    """Bytes of a weight ``[..., N, K]`` quantized with ``config``: ``HQQTensor.nbytes`` without quantizing it.

    scale_dtype: of plain scales and zero points where ``config`` leaves the choice to the weight's numbers.
    """
    *lead, out_features, in_features = shape
    matrices, fmt = math.prod(lead), get_format(config.format)
    rows, columns = scale_shape(out_features, in_features, config)
    dtype = config.scale_dtype or scale_dtype

    def of_groups(nbits: int | None) -> int:
        """Bytes of a scale (or zero point) for each group of a matrix."""
        if nbits is None:
            return rows * columns * dtype.itemsize
        ranges = -(-rows // min(META_GROUP, rows)) * columns  # each with a float32 scale and zero point
        return rows * meta_bytes(columns, meta_width(nbits, columns)) + ranges * 2 * torch.float32.itemsize

    total = matrices * (out_features * row_bytes(in_features, config.nbits) + of_groups(config.scale_nbits))
    if fmt.learned:
        books = out_features if config.codebook == "row" else 1
        total += matrices * books * 2**config.nbits * codebook_dtype(config).itemsize
    elif fmt.has_zero_point:
        total += matrices * of_groups(config.zero_nbits)
    has_act_pre_scale = config.solver == column_scaled.NAME or config.rotation
    return total + has_act_pre_scale * in_features * torch.float16.itemsize


def scale_shape(out_features: int, in_features: int, config: HqqConfig) -> tuple[int, int]:
    """Rows and columns of the scales of a weight ``[N, K]``."""
    if config.axis == 1:
        return out_features, -(-in_features // (config.group_size or in_features))
    return -(-out_features // (config.group_size or out_features)), in_features


def meta_width(nbits: int, columns: int) -> int:
    """Bits of quantized scales in rows of ``columns``: one column takes a byte in any case, so it is used in full."""
    return nbits if columns > 1 else 8


def _solve_by_triton(matrix: Tensor, group_size: int, config: HqqConfig) -> Solution | None:
    """Solve ``[N, K]`` where the Triton kernels run; None, with a warning that says why, for what they do not have."""
    if not serves("triton", matrix.device.type):
        return None
    extent = matrix.shape[config.axis]
    members = group_size if config.axis == 1 else -(-extent // -(-extent // group_size))
    reason = triton.why_not_solved(config.solver, config.lp_norm, config.format, members)
    if reason is not None:
        warnings.warn(f"quantized by torch's operations, more slowly: {reason}", stacklevel=2)
        return None
    return Solution(*triton.solve_groups(matrix, config.nbits, group_size, config.axis, config.solver))


def _solve(matrix: Tensor, group_size: int, config: HqqConfig) -> Solution:
    """Solve ``[N, K]``, with zero points that can be stored where storage is coarse."""
    found = _solve_by_triton(matrix, group_size, config) or _solve_freely(matrix, group_size, config)
    dtype = None if config.integer_zero else config.scale_dtype
    if found.zero_point is None or not get_format(config.format).has_zero_point or config.solver == "hqq":
        return found
    if config.solver == "rtn":
        return replace(found, zero_point=found.zero_point.round()) if config.integer_zero else found
    if not config.integer_zero and (dtype is None or config.quant_zero or not is_coarse(found.zero_point, dtype)):
        return found
    parts, joined = _parts(matrix, group_size, config.axis), 1 if config.axis == 1 else 0
    sizes = [part.shape[joined] for part in parts]
    split = zip(parts, found.inverse_scale.split(sizes, joined), found.zero_point.split(sizes, joined), strict=True)
    refitted = [refit(part, inv, zero, config.nbits, config.lp_norm, dtype) for part, inv, zero in split]
    inverse, zero_point = (torch.cat(each, joined) for each in zip(*refitted, strict=True))
    return Solution(inverse, zero_point)


def _solve_freely(matrix: Tensor, group_size: int, config: HqqConfig) -> Solution:
    """Solve ``[N, K]``; a ragged last group is solved at its own length, so that padding cannot weigh in."""
    compiled = _on_cpu_kernels(matrix) and cpu.solves(config.solver, config.lp_norm, config.format)
    if compiled and config.format == "int":
        solved = cpu.solve(matrix, config.nbits, group_size, config.axis, config.solver)
        return Solution(*solved, exact_encode=config.solver == "hqq")
    fmt, parts = get_format(config.format), _parts(matrix, group_size, config.axis)
    levels, entries = fmt.levels(config.nbits), None
    if fmt.learned:
        passes: Passes = cpu.LloydPasses() if _on_cpu_kernels(matrix) else TORCH_PASSES
        entries = learn(parts, config.nbits, config.codebook == "row", codebook_dtype(config), passes)
        levels = Levels.between(entries if config.codebook == "row" else entries[0])
    if compiled and levels is not None:
        inverse = cpu.solve_levels(matrix, levels, group_size, config.axis, config.solver, config.format)
        return Solution(inverse, entries)
    solve, options = get_solver(config.solver), SolverOptions(config.lp_norm, levels)
    found = [solve(part, config.nbits, options) for part in parts]
    joined = 1 if config.axis == 1 else 0
    zeros = [s.zero_point for s in found if s.zero_point is not None]
    return Solution(
        torch.cat([s.inverse_scale for s in found], dim=joined),
        torch.cat(zeros, dim=joined) if zeros else entries,
        found[0].exact_encode,
    )


def _parts(matrix: Tensor, group_size: int, axis: int) -> list[Tensor]:
    """The groups of ``[N, K]`` as views ``[rows, columns, group]``: those of full length, and the ragged rest."""
    out_features, in_features = matrix.shape
    if axis == 1:
        full = in_features // group_size
        parts = [matrix[:, : full * group_size].unflatten(1, (full, group_size))] if full else []
        if in_features % group_size:
            parts.append(matrix[:, full * group_size :].unsqueeze(1))
    else:
        groups = -(-out_features // group_size)
        rows, rest = divmod(out_features, groups)
        regular = matrix[: rows * groups].unflatten(0, (rows, groups))
        parts = [regular[:, rest:].permute(1, 2, 0)]
        if rest:
            longer = torch.cat([regular[:, :rest], matrix[rows * groups :].unsqueeze(0)])
            parts.insert(0, longer.permute(1, 2, 0))
    return parts


def _assign(
    matrix: Tensor, inverse: Tensor, zero_point: Tensor | None, out: Tensor, group_size: int, config: HqqConfig
) -> None:
    """Write the packed nearest codes of ``[N, K]`` into ``out``, a chunk of rows at a time."""
    fmt, where = get_format(config.format), (config.nbits, group_size, config.axis)
    if _on_cpu_kernels(matrix) and cpu.assigns(config.format):
        if config.format == "int":
            assert zero_point is not None
            return cpu.assign(out, matrix, inverse, zero_point, *where)
        levels = fmt.levels(config.nbits) if zero_point is None else Levels.between(zero_point)
        assert levels is not None
        return cpu.assign_levels(out, matrix, inverse, levels, *where, config.format)
    out_features, in_features = matrix.shape
    groups = inverse.shape[0]
    step = max(1, CHUNK // in_features)
    if config.axis == 0:
        # Row n uses group n % groups, so chunks of whole periods see the same scales.
        step = max(groups, step // groups * groups)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        count = rows.stop - rows.start
        size = (count, in_features, group_size, config.axis)
        zero = zero_point
        inv = expand_groups(inverse[rows] if config.axis == 1 else inverse, *size)
        if zero is not None and fmt.learned:
            zero = zero if zero.shape[0] == 1 else zero[rows]
        elif zero is not None:
            zero = expand_groups(zero[rows] if config.axis == 1 else zero, *size)
        out[rows] = pack(fmt.encode(matrix[rows].to(torch.float32), inv, zero, config.nbits), config.nbits)


def _on_cpu_kernels(matrix: Tensor) -> bool:
    return serves("cpu", matrix.device.type)


def codebook_dtype(config: HqqConfig) -> torch.dtype:
    """Storage dtype of learned entries, which lie within -1 and 1: that of scales, float16 where none was chosen."""
    return config.scale_dtype or torch.float16


def _finite(values: Tensor) -> bool:
    """Whether no number is NaN or Inf; the range shows them, and is found faster than each is looked at."""
    return all(bool(bound.isfinite()) for bound in values.aminmax())


def _storage_dtype(scale: Tensor, zero_point: Tensor | None) -> torch.dtype:
    """float16 where scales are zero or normal numbers there and zero points keep 1/16 of a code, else float32."""
    info, size = torch.finfo(torch.float16), scale.abs()
    fits = (size == 0) | ((size >= info.tiny) & (size <= info.max))
    if zero_point is not None:
        fits &= zero_point.abs() <= 256
    return torch.float16 if bool(fits.all()) else torch.float32


def _store(
    values: Tensor, dtype: torch.dtype, nbits: int | None, name: str, columns: int | None = None
) -> tuple["Tensor | Encoded", Tensor]:
    """``values`` as they are kept, in ``dtype`` or ``nbits`` bits, and as they read back in float32.

    columns: of the whole, where ``values`` are a part of its columns.
    """
    if nbits is None:
        stored = values.to(dtype)
        if not _finite(stored):
            raise ValueError(f"scale_dtype {dtype} cannot hold this weight's {name}s; use float32 or None")
        return stored, stored.to(torch.float32)
    size = min(META_GROUP, values.shape[-2])
    nbits = meta_width(nbits, columns or values.shape[-1])
    # With 256 levels the range is as good as the best fit; with 16 the fit takes 4 % off a 4-bit weight's squared
    # error, more where rows differ in size.
    solver = "rtn" if nbits == 8 else "hqq_joint"
    encoded = encode(values, HqqConfig(nbits=nbits, group_size=size, axis=0, solver=solver, scale_dtype=torch.float32))
    assert isinstance(encoded.scale, Tensor) and isinstance(encoded.zero_point, Tensor)
    meta = (encoded.scale, encoded.zero_point)
    return encoded, dequantize(encoded.qdata, *meta, [], nbits, "int", size, 0, values.shape[-1], torch.float32)
