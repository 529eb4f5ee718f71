"""The low-rank matrices that stand for most of the error of one quantized weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqtensor.calibration.build import check_calibrated, from_calibrated
from hqqtensor.calibration.moments import InputMoments, damped_factor
from hqqtensor.integrations.peft import lora
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.settings import config_of

_OVERSAMPLING = 16
"""Further directions that the randomized SVD follows, which bring it nearer to an exact one."""


@dataclass(frozen=True)
class Correction:
    """lhs ``[..., outputs, rank]`` and rhs ``[..., rank, inputs]``, float32: their product undoes part of the error.

    quantized: the weight quantized again, None where it stays. left: share of the squared error that is left.
    """

    lhs: Tensor
    rhs: Tensor
    quantized: HQQTensor | None
    left: float


def correct(
    original: Tensor, quantized: HQQTensor, orient: Callable[[Tensor], Tensor], rank: int, second: Tensor | None,
    rounds: int,
) -> Correction:  # fmt: skip
    """The best correction of ``quantized`` towards ``original``, float32 of the same shape.

    orient: gives either as ``[..., outputs, inputs]``. second: float32 second moments ``[inputs, inputs]`` of the
    inputs, by which the error is that of the outputs; None: that of the weights. rounds: how many times ``original``
    less the product of the two matrices is quantized again and the matrices fitted anew; the best of all is taken.
    """
    root = None if second is None else damped_factor(second)

    def size(error: Tensor) -> float:
        return float((error if root is None else error.to(root.dtype) @ root).square().sum())

    error = orient(original - quantized.dequantize().float())
    at_first, best = max(size(error), 1e-30), None
    candidate: HQQTensor | None = None
    for turn in range(rounds + 1):
        lhs, rhs = _weighted_low_rank(error, rank, root)
        left = size(error - lhs @ rhs) / at_first
        if best is None or left < best.left:
            best = Correction(lhs, rhs, candidate, left)
        if turn < rounds:
            candidate = _quantized_again(original - orient(lhs @ rhs), quantized, second)
            error = orient(original - candidate.dequantize().float())
    assert best is not None
    return best


def _quantized_again(dense: Tensor, old: HQQTensor, second: Tensor | None) -> HQQTensor:
    """``dense`` with the settings that ``old`` shows; where they allow it, with errors fed back to later inputs."""
    if second is not None:
        config = config_of(old)
        try:
            check_calibrated(config, "weight", "full")
        except ValueError:  # settings that calibration does not serve: quantized by the weights alone
            return lora.quantize_like(dense, old)
        weight = dense.mT if old.transposed else dense
        new = from_calibrated(weight, config, InputMoments(second))[0]
        return new.transpose(-1, -2) if old.transposed else new  # type: ignore[return-value]
    return lora.quantize_like(dense, old)


def _weighted_low_rank(error: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two matrices nearest to ``error``: where ``root`` is L with L L^T the second moments, in the outputs.

    |(error - B A) L| is least where B A L is the best approximation of error L.
    """
    if root is None:
        return _low_rank(error, rank)
    lhs, rhs = _low_rank((error.to(root.dtype) @ root).to(torch.float32), rank)
    rhs = torch.linalg.solve_triangular(root, rhs.to(root.dtype), upper=False, left=False)
    return lhs, rhs.to(torch.float32)


def _low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[..., N, rank]`` and ``[..., rank, K]``: their product is nearest to ``error`` in the sum of squares."""
    directions = min(rank + _OVERSAMPLING, *error.shape[-2:])
    with torch.random.fork_rng([error.device] if error.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(error, directions, niter=4)
    root, missing = s[..., None, :rank].sqrt(), max(0, rank - directions)
    lhs, rhs = (nn.functional.pad(side[..., :rank] * root, (0, missing)) for side in (u, v))
    return lhs, rhs.mT
