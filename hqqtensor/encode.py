"""From a weight to packed codes, scale and zero point: solver, rounding for storage, codes, packing.

Scales are found and codes packed by the encoder of the backend that serves the weight's device, where there is one
(``ops.backend.encoder``); torch's operations do what it cannot.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqqtensor import transforms
from hqqtensor.config import HqqConfig
from hqqtensor.formats import Levels, get_format
from hqqtensor.ops.backend import encoder
from hqqtensor.ops.encoder import EncodeSettings
from hqqtensor.ops.packed import PackedWeight
from hqqtensor.ops.reference import dequantize, expand_groups
from hqqtensor.packing import pack, row_bytes
from hqqtensor.solvers import Solution, get_solver
from hqqtensor.solvers.base import CHUNK, SolverOptions
from hqqtensor.solvers.coarse_zero import is_coarse, refit
from hqqtensor.solvers.codebook import TORCH_PASSES, learn
from hqqtensor.stored_size import META_GROUP, codebook_dtype, meta_width, scale_shape


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
        transforms.check_rotation(weight.shape[-1], name)
    if config.view_as_float and row_bytes(weight.shape[-1], config.nbits) % weight.element_size():
        raise ValueError(
            f"{name}: view_as_float needs packed rows of a multiple of {weight.element_size()} bytes, "
            f"got {row_bytes(weight.shape[-1], config.nbits)} ({config.nbits} bits, in_features {weight.shape[-1]})"
        )
    if not _finite(weight.detach()):
        raise ValueError(f"{name}: holds NaN or Inf; quantization needs finite weights")


def prepare(weight: Tensor, config: HqqConfig) -> tuple[Tensor, HqqConfig, Tensor | None, int]:
    """``transforms.prepare`` with what the weight's device has for it."""
    return transforms.prepare(weight, config, encoder(weight.device.type))


def encode(weight: Tensor, config: HqqConfig) -> Encoded:
    """Quantize a weight ``[..., N, K]`` that ``check_weight`` has passed.

    Raises ValueError where ``config.scale_dtype`` cannot hold the weight's scales or zero points.
    """
    weight, fmt = weight.detach(), get_format(config.format)
    *lead, out_features, in_features = weight.shape
    group_size = config.group_size or (in_features if config.axis == 1 else out_features)
    # With groups along in_features all matrices are solved as one, unless each has a codebook to learn.
    rows = weight.numel() // in_features if config.axis == 1 and not fmt.learned else out_features
    matrices = list(weight.reshape(-1, rows, in_features))
    solutions = [solve_matrix(matrix, group_size, config) for matrix in matrices]

    shape = [*lead, *scale_shape(out_features, in_features, config)]
    inverse = torch.stack([s.inverse_scale for s in solutions]).reshape(shape)
    zeros = [s.zero_point for s in solutions if s.zero_point is not None]
    zero_shape = [*lead, -1, zeros[0].shape[-1]] if fmt.learned else shape
    zero_point = torch.stack(zeros).reshape(zero_shape) if zeros else None
    scale = inverse.reciprocal()
    dtype = config.scale_dtype or storage_dtype(scale, zero_point if fmt.has_zero_point else None)
    stored_scale, read_scale = store(scale, dtype, config.scale_nbits, "scale")
    stored_zero: Tensor | Encoded | None = None
    read_zero = zero_point
    if zero_point is not None and fmt.learned:
        stored_zero = zero_point.to(codebook_dtype(config))
    elif zero_point is not None:
        stored_zero, read_zero = store(zero_point, dtype, config.zero_nbits, "zero_point")
    if not solutions[0].exact_encode:
        # A scale that rounding or few bits made zero can reach nothing but zero itself, whatever the code.
        inverse, zero_point = torch.where(read_scale == 0, 0.0, read_scale.reciprocal()), read_zero
    device_encoder = encoder(weight.device.type)
    sizes = (*lead, out_features, row_bytes(in_features, config.nbits))
    if device_encoder is None:
        qdata = torch.empty(sizes, dtype=torch.uint8, device=weight.device)
    else:
        qdata = device_encoder.empty_packed(sizes, weight.device)
    _assign_all(qdata, matrices, inverse, zero_point, group_size, config)
    return Encoded(qdata, stored_scale, stored_zero, config.nbits, group_size, config.axis, weight.shape)


def _settings(config: HqqConfig, group_size: int) -> EncodeSettings:
    return EncodeSettings(config.nbits, group_size, config.axis, config.format, config.solver, config.lp_norm)


def solve_matrix(matrix: Tensor, group_size: int, config: HqqConfig) -> Solution:
    """Scales and zero points of ``[N, K]``, the zero points on their storage grid where that grid is coarse.

    For a learned codebook the zero point has the entries. Shapes as in ``Encoder.solve``. Warns where the device has an
    encoder that cannot solve this.
    """
    solution = _solve_freely(matrix, group_size, config)
    dtype = None if config.integer_zero else config.scale_dtype
    if solution.zero_point is None or not get_format(config.format).has_zero_point or config.solver == "hqq":
        return solution
    if config.solver == "rtn":
        return replace(solution, zero_point=solution.zero_point.round()) if config.integer_zero else solution
    if not config.integer_zero and (dtype is None or config.quant_zero or not is_coarse(solution.zero_point, dtype)):
        return solution
    parts, joined = _parts(matrix, group_size, config.axis), 1 if config.axis == 1 else 0
    sizes = [part.shape[joined] for part in parts]
    inverses, zeros = (t.split(sizes, joined) for t in (solution.inverse_scale, solution.zero_point))
    by_part = zip(parts, inverses, zeros, strict=True)
    refitted = [refit(part, inv, zero, config.nbits, config.lp_norm, dtype) for part, inv, zero in by_part]
    inverse, zero_point = (torch.cat(each, joined) for each in zip(*refitted, strict=True))
    return Solution(inverse, zero_point)


def _solve_freely(matrix: Tensor, group_size: int, config: HqqConfig) -> Solution:
    """Solve ``[N, K]`` without regard to storage.

    A ragged last group is solved at its own length, so that padding has no weight in it.
    """
    fmt, parts = get_format(config.format), _parts(matrix, group_size, config.axis)
    device_encoder = encoder(matrix.device.type)
    levels, entries = fmt.levels(config.nbits), None
    if fmt.learned:
        passes = (None if device_encoder is None else device_encoder.passes) or TORCH_PASSES
        entries = learn(parts, config.nbits, config.codebook == "row", codebook_dtype(config), passes)
        levels = Levels.between(entries if config.codebook == "row" else entries[0])
    if device_encoder is not None:
        settings = _settings(config, group_size)
        reason = device_encoder.why_not("solve", matrix, settings)
        if reason is None:
            solution = device_encoder.solve(matrix, settings, levels)
            return replace(solution, zero_point=entries) if fmt.learned else solution
        warnings.warn(f"quantized by torch's operations, more slowly: {reason}", stacklevel=2)
    solve, options = get_solver(config.solver), SolverOptions(config.lp_norm, levels)
    solutions = [solve(part, config.nbits, options) for part in parts]
    joined = 1 if config.axis == 1 else 0
    zeros = [s.zero_point for s in solutions if s.zero_point is not None]
    return Solution(
        torch.cat([s.inverse_scale for s in solutions], dim=joined),
        torch.cat(zeros, dim=joined) if zeros else entries,
        solutions[0].exact_encode,
    )


def _parts(matrix: Tensor, group_size: int, axis: int) -> list[Tensor]:
    """The groups of ``[N, K]`` as views ``[rows, columns, group]``: those of full length, and the ragged ones."""
    out_features, in_features = matrix.shape
    if axis == 1:
        full = in_features // group_size
        parts = [matrix[:, : full * group_size].unflatten(1, (full, group_size))] if full else []
        if in_features % group_size:
            parts.append(matrix[:, full * group_size :].unsqueeze(1))
    else:
        groups = -(-out_features // group_size)
        rows, longer_groups = divmod(out_features, groups)
        regular = matrix[: rows * groups].unflatten(0, (rows, groups))
        parts = [regular[:, longer_groups:].permute(1, 2, 0)]
        if longer_groups:
            longer = torch.cat([regular[:, :longer_groups], matrix[rows * groups :].unsqueeze(0)])
            parts.insert(0, longer.permute(1, 2, 0))
    return parts


def _assign_all(
    out: Tensor, matrices: list[Tensor], inverse: Tensor, zero_point: Tensor | None, group_size: int, config: HqqConfig
) -> None:
    """Write the packed nearest codes of equal matrices ``[N, K]`` into ``out``, uint8 ``[..., N, row_bytes]``.

    inverse, zero_point: ``[..., rows, columns]``, those of all matrices one after the other.
    """

    def by_matrix(values: Tensor | None) -> Sequence[Tensor | None]:
        count = len(matrices)
        return [None] * count if values is None else list(values.reshape(count, -1, values.shape[-1]))

    settings, device_encoder = _settings(config, group_size), encoder(out.device.type)
    for matrix, inv, zero, rows in zip(matrices, *map(by_matrix, (inverse, zero_point, out)), strict=True):
        assert inv is not None and rows is not None
        if device_encoder is not None and device_encoder.why_not("assign", matrix, settings) is None:
            device_encoder.assign(rows, matrix, inv, zero, settings)
        else:
            _assign(matrix, inv, zero, rows, group_size, config)


def _assign(
    matrix: Tensor, inverse: Tensor, zero_point: Tensor | None, out: Tensor, group_size: int, config: HqqConfig
) -> None:
    """Write the packed nearest codes of ``[N, K]`` into ``out``, a chunk of rows at a time."""
    fmt = get_format(config.format)
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


def _finite(values: Tensor) -> bool:
    """Whether no number is NaN or Inf; the range shows them, and is found faster than each is looked at."""
    return all(bool(bound.isfinite()) for bound in values.aminmax())


def storage_dtype(scale: Tensor, zero_point: Tensor | None) -> torch.dtype:
    """The dtype to store scales and zero points in where the user chose none: float16 or float32.

    float16 where it holds every scale as zero or a normal number, and every zero point to 1/16 of a code.
    """
    info, size = torch.finfo(torch.float16), scale.abs()
    fits = (size == 0) | ((size >= info.tiny) & (size <= info.max))
    if zero_point is not None:
        fits &= zero_point.abs() <= 256
    return torch.float16 if bool(fits.all()) else torch.float32


def store(
    values: Tensor, dtype: torch.dtype, nbits: int | None, name: str, columns: int | None = None
) -> tuple["Tensor | Encoded", Tensor]:
    """Scales or zero points ``[..., rows, columns]`` as they are stored, and as they read back in float32.

    dtype: of plain ones. nbits: 4 or 8 quantizes them. name: "scale" or "zero_point", for the error. columns: of the
    whole where ``values`` are some of its columns. ValueError where ``dtype`` cannot hold a value.
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
    packed = PackedWeight(encoded.qdata, *meta, None, nbits, "int", size, 0, values.shape[-1])
    return encoded, dequantize(packed, torch.float32)
