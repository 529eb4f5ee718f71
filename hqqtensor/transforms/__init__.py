"""What is done to weights and activations alike before a product: column scales and Hadamard rotation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hqqtensor.config import HqqConfig
from hqqtensor.solvers import column_scaled
from hqqtensor.transforms.column_scale import column_scale
from hqqtensor.transforms.hadamard import block_of, check_rotation, rotate, signs

__all__ = ["block_of", "check_rotation", "column_scale", "prepare", "rotate", "signs", "to_inputs"]


class Compiled(Protocol):
    """What a device may have for this; ``ops.encoder.Encoder`` says what each does."""

    column_spread: Callable[[Tensor, int], Tensor] | None

    def empty_packed(self, sizes: Sequence[int], device: torch.device) -> Tensor: ...


def prepare(
    weight: Tensor, config: HqqConfig, compiled: Compiled | None = None
) -> tuple[Tensor, HqqConfig, Tensor | None, int]:
    """What to quantize for ``weight`` ``[..., N, K]``: (weight, settings, act_pre_scale, rotation block).

    act_pre_scale: float16 ``[K]``, column scales times signs, or None. The weight is divided by it, then rotated in
    blocks (0: not at all). The settings ask for neither of the two any more. ValueError for column scales with axis 0.
    """
    inner, act, block = config, None, 0
    if config.solver == column_scaled.NAME:
        inner = _for_scaled(config)
        act = column_scale(weight, None if compiled is None else compiled.column_spread).to(torch.float16)
    if config.rotation:
        inner, block = dataclasses.replace(inner, rotation=False), block_of(weight.shape[-1])
        sign = signs(weight.shape[-1], config.rotation_seed).to(weight.device, torch.float16)
        act = sign if act is None else act * sign
    if act is None:
        return weight, inner, None, 0
    w = _float_copy(weight.detach(), compiled).div_(act.to(torch.float32))
    return rotate(w, block) if block else w, inner, act, block


def _float_copy(weight: Tensor, compiled: Compiled | None) -> Tensor:
    """float32; in memory of the kind that packed codes get, which takes a quarter of the time to touch first."""
    if compiled is None:
        return weight.to(torch.float32, copy=True)
    sizes = (*weight.shape[:-1], 4 * weight.shape[-1])
    return compiled.empty_packed(sizes, weight.device).view(torch.float32).copy_(weight)


def to_inputs(x: Tensor, act: Tensor | None, block: int) -> Tensor:
    """``x [..., K]`` as the prepared weight takes it: times ``act``, the act_pre_scale, then rotated in blocks."""
    return rotate(x if act is None else x * act.to(x.dtype), block)


def _for_scaled(config: HqqConfig) -> HqqConfig:
    """``config`` for the scaled weight; ValueError for axis 0, where every column already has its scales."""
    if config.axis == 0:
        raise ValueError("solver 'column_scaled' needs axis 1: with axis 0 every column has scales of its own")
    return dataclasses.replace(config, solver="hqq_joint")
