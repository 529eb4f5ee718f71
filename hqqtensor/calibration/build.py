"""An HQQTensor from a weight and the second moments of its inputs."""

import torch
from torch import Tensor

from hqqtensor.calibration.feedback import feed_back
from hqqtensor.calibration.weighted import solve_weighted
from hqqtensor.config import HqqConfig
from hqqtensor.encode import Encoded, storage_dtype, store
from hqqtensor.packing import pack
from hqqtensor.solvers import column_scaled
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import prepare, rotate


def check_calibrated(config: HqqConfig, name: str, mode: str) -> None:
    """ValueError naming ``name`` for settings that calibration in this mode does not serve."""
    if config.rotation and mode != "full":
        raise ValueError(f'{name}: rotation mixes inputs; calibrate with mode "full", not {mode!r}')
    if config.format != "int" or config.axis != 1:
        raise ValueError(f"{name}: calibration serves format 'int' and axis 1, got {config.format!r} and {config.axis}")
    if config.integer_zero:
        raise ValueError(f"{name}: calibration does not serve integer_zero; calibrated zero points are real numbers")
    if config.solver not in ("hqq_joint", column_scaled.NAME):
        raise ValueError(f"{name}: calibration serves hqq_joint and column_scaled, got solver {config.solver!r}")


def from_calibrated(weight: Tensor, config: HqqConfig, moments: Tensor) -> HQQTensor:
    """Quantize a ``weight`` ``[N, K]`` that ``check_weight`` and ``check_calibrated`` have passed.

    moments: float32 second moments of the weight's inputs, ``[K]`` to weight the errors of columns, or ``[K, K]`` for
    error feedback. ValueError where ``config.scale_dtype`` cannot hold the scales or zero points.
    """
    w, _, act, block = prepare(weight, config)
    w = w.to(torch.float32)
    # The inputs of the prepared weight: multiplied by act, then rotated.
    if act is not None:
        d = act.to(torch.float32)
        moments = moments * (d * d if moments.ndim == 1 else d * d.unsqueeze(1))
    if block:
        moments = rotate(rotate(moments, block).T, block)
    size = config.group_size or w.shape[1]
    scale, zero = _grid(w, size, config, moments if moments.ndim == 1 else moments.diagonal())
    dtype, groups = config.scale_dtype or storage_dtype(scale, zero), scale.shape[1]

    def store_both(s: Tensor, z: Tensor) -> tuple[tuple[Tensor | Encoded, Tensor], tuple[Tensor | Encoded, Tensor]]:
        return (
            store(s, dtype, config.scale_nbits, "scale", groups),
            store(z, dtype, config.zero_nbits, "zero_point", groups),
        )

    def read_back(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        (_, read_scale), (_, read_zero) = store_both(s, z)
        return read_scale, read_zero

    if moments.ndim == 2:
        codes, scale, zero = feed_back(w, moments, config.nbits, size, read_back)
        # Columns of groups are stored independently of one another, so all at once read back as one by one.
        (stored_scale, _), (stored_zero, _) = store_both(scale, zero)
    else:
        (stored_scale, s), (stored_zero, z) = store_both(scale, zero)
        s, z = (t.repeat_interleave(size, -1)[:, : w.shape[1]] for t in (s, z))
        inverse = torch.where(s == 0, 0.0, s.reciprocal())
        codes = (w * inverse).add_(z).round_().clamp_(0, 2**config.nbits - 1).to(torch.uint8)
    qdata = pack(codes, config.nbits)
    encoded = Encoded(qdata, stored_scale, stored_zero, config.nbits, size, axis=1, shape=weight.shape)
    return HQQTensor.from_encoded(encoded, config, weight.dtype, act, block)


def _grid(w: Tensor, size: int, config: HqqConfig, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 ``[N, groups]``, of the groups of ``[N, K]``; a ragged last one is not padded."""
    full = w.shape[1] // size * size
    parts = [(w[:, :full].unflatten(1, (-1, size)), importance[:full].unflatten(0, (-1, size)))] if full else []
    if full < w.shape[1]:
        parts.append((w[:, full:].unsqueeze(1), importance[full:].unsqueeze(0)))
    solutions = [solve_weighted(groups, config.nbits, weights) for groups, weights in parts]
    return torch.cat([s for s, _ in solutions], 1), torch.cat([z for _, z in solutions], 1)
