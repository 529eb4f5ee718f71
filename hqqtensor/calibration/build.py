"""An HQQTensor from a weight and the second moments of its inputs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtensor.calibration.feedback import column_steps, feed_back
from hqqtensor.calibration.moments import InputMoments
from hqqtensor.calibration.weighted import normalized
from hqqtensor.config import HqqConfig
from hqqtensor.encode import Encoded, prepare, storage_dtype, store
from hqqtensor.packing import pack
from hqqtensor.solvers import column_scaled
from hqqtensor.tensor import HQQTensor


def check_calibrated(config: HqqConfig, name: str, mode: str) -> None:
    """ValueError naming ``name`` for settings that calibration in this mode does not serve."""
    if config.rotation and mode == "diagonal":
        raise ValueError(f'{name}: rotation mixes inputs; calibrate with mode "full", not {mode!r}')
    if config.format != "int" or config.axis != 1:
        raise ValueError(f"{name}: calibration serves format 'int' and axis 1, got {config.format!r} and {config.axis}")
    if config.integer_zero:
        raise ValueError(f"{name}: calibration does not serve integer_zero; calibrated zero points are real numbers")
    if config.solver not in ("hqq_joint", column_scaled.NAME):
        raise ValueError(f"{name}: calibration serves hqq_joint and column_scaled, got solver {config.solver!r}")


def from_calibrated(weight: Tensor, config: HqqConfig, moments: InputMoments) -> tuple[HQQTensor, Tensor | None]:
    """Quantize a ``weight`` ``[N, K]`` that ``check_weight`` and ``check_calibrated`` have passed.

    With it comes, where errors were fed back, by how many codes each weight lay above its code, float32 ``[N, K]``.

    moments: of the weight's inputs; their diagonal weighs the errors of columns, whole ones serve error feedback
    towards the dense model's outputs. ValueError where ``config.scale_dtype`` cannot hold the scales or zero points.
    """
    w, _, act, block = prepare(weight, config)
    encoded, above = _encode(w, config, moments.prepared(act, block))
    return HQQTensor.from_encoded(encoded, config, weight.dtype, act, block), above


def experts_from_calibrated(
    weight: Tensor, config: HqqConfig, moments: Callable[[int], InputMoments], done: Callable[[int], None]
) -> HQQTensor:
    """``from_calibrated`` for a stack ``[E, N, K]``: moments(expert) are those of one matrix; done(expert): after it.

    Column scales and rotation are those of the whole stack, as without calibration.
    """
    w, _, act, block = prepare(weight, config)
    parts = []
    for expert, matrix in enumerate(w.detach()):
        parts.append(_encode(matrix.contiguous(), config, moments(expert).prepared(act, block))[0])
        done(expert)
    return HQQTensor.from_encoded(_stacked(parts), config, weight.dtype, act, block)


def _stacked(parts: Sequence[Encoded]) -> Encoded:
    """``[N, K]`` with the same settings as one ``[E, N, K]``; float16 scales become float32 where others are."""

    def stack(values: Sequence[Any]) -> Any:
        if values[0] is None or isinstance(values[0], Encoded):
            return values[0] and _stacked(values)
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
        return torch.stack([value.to(dtype) for value in values])

    data = {name: stack([getattr(part, name) for part in parts]) for name in ("qdata", "scale", "zero_point")}
    return dataclasses.replace(parts[0], **data, shape=torch.Size([len(parts), *parts[0].shape]))


def _encode(weight: Tensor, config: HqqConfig, moments: InputMoments) -> tuple[Encoded, Tensor | None]:
    """Codes, scales and zero points of a prepared ``[N, K]``, and what ``from_calibrated`` gives with them."""
    w = weight.to(torch.float32)
    size = config.group_size or w.shape[1]
    groups = -(-w.shape[1] // size)
    dtype, is_full = config.scale_dtype, moments.second.ndim == 2
    if is_full:
        w = moments.towards_dense(w)
    if not is_full or (dtype is None and None in (config.scale_nbits, config.zero_nbits)):
        scale, zero = _grid(w, size, config.nbits, moments.diagonal)
        dtype = dtype or storage_dtype(scale, zero)
    dtype = dtype or torch.float16  # all are quantized: it is not used

    def store_both(s: Tensor, z: Tensor) -> tuple[tuple[Tensor | Encoded, Tensor], tuple[Tensor | Encoded, Tensor]]:
        return (
            store(s, dtype, config.scale_nbits, "scale", groups),
            store(z, dtype, config.zero_nbits, "zero_point", groups),
        )

    def read_back(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        (_, read_scale), (_, read_zero) = store_both(s, z)
        return read_scale, read_zero

    above = None
    if is_full:
        codes, scale, zero, above = feed_back(w, moments.upper, config.nbits, size, read_back)
        # Columns of groups are stored independently of one another, so all at once read back as one by one.
        (stored_scale, _), (stored_zero, _) = store_both(scale, zero)
    else:
        (stored_scale, s), (stored_zero, z) = store_both(scale, zero)
        s, z = (t.repeat_interleave(size, -1)[:, : w.shape[1]] for t in (s, z))
        inverse = torch.where(s == 0, 0.0, s.reciprocal())
        codes = (w * inverse).add_(z).round_().clamp_(0, 2**config.nbits - 1).to(torch.uint8)
    qdata = pack(codes, config.nbits)
    return Encoded(qdata, stored_scale, stored_zero, config.nbits, size, axis=1, shape=weight.shape), above


def _grid(w: Tensor, size: int, nbits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 ``[N, groups]``, of the groups of ``[N, K]``; a ragged last one is not padded."""
    steps = column_steps(w.device)
    parts = zip(w.split(size, 1), importance.split(size), strict=True)
    solutions = [steps.solve(group, normalized(weights), nbits) for group, weights in parts]
    return torch.cat([s for s, _ in solutions], 1), torch.cat([z for _, z in solutions], 1)
