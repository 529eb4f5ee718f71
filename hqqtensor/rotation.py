"""Random Hadamard rotation of a weight's inputs, and what is done to weights and activations alike before a product.

Q = H D, with D random signs and H a normalised Hadamard matrix, is orthogonal: W x = (W Q^T) (Q x). It mixes each
input with others, so that no column or single weight stands out of its group (QuIP#, Tseng et al. 2024,
arXiv 2402.04396; QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). in_features that are no power of two are rotated in
blocks of the largest power of two that divides them. The signs go to ``act_pre_scale``, together with column scales
where there are any; H needs no storage but the length of its blocks.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hqqtensor.solvers import column_scaled

if TYPE_CHECKING:
    from hqqtensor.config import HqqConfig

SMALLEST = 8
"""Blocks of fewer inputs mix too little to be of use."""


def block_of(in_features: int) -> int:
    """Inputs that are mixed with one another: the largest power of two that divides ``in_features``."""
    return in_features & -in_features


def check_rotation(in_features: int, name: str) -> None:
    """ValueError naming ``name`` where ``in_features`` cannot be cut into blocks worth rotating."""
    if block_of(in_features) < SMALLEST:
        raise ValueError(f"{name}: rotation needs in_features that {SMALLEST} divides, got {in_features}")


def rotate(x: Tensor, block: int) -> Tensor:
    """H times each run of ``block`` numbers along the last dimension of ``x``, computed in float32, in x's dtype.

    H is Sylvester's, symmetric and divided by sqrt(block), hence its own inverse. It is applied as a product of
    factors: log2(block) sums and differences a number.
    """
    y = x.to(torch.float32).unflatten(-1, (-1, block))
    size = 1
    while size < block:
        even, odd = y.unflatten(-1, (-1, 2, size)).unbind(-2)
        y = torch.stack((even + odd, even - odd), -2).flatten(-3)
        size *= 2
    return (y * block**-0.5).flatten(-2).to(x.dtype)


def signs(in_features: int, seed: int) -> Tensor:
    """float32 ``[in_features]`` of 1 and -1: the same for the same length and seed, so layers share their rotation."""
    return torch.randint(0, 2, (in_features,), generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).float()


def prepare(weight: Tensor, config: "HqqConfig") -> tuple[Tensor, "HqqConfig", Tensor | None, int]:
    """The weight ``[..., N, K]`` to quantize for ``config``, with which settings, act_pre_scale, and block (0: none).

    act_pre_scale: float16 ``[K]``, column scales and signs, or None; the weight is divided by it, then rotated.
    """
    inner, act, block = config, None, 0
    if config.solver == column_scaled.NAME:
        inner = column_scaled.inner(config)
        act = column_scaled.column_scale(weight).to(torch.float16)
    if config.rotation:
        inner, block = dataclasses.replace(inner, rotation=False), block_of(weight.shape[-1])
        sign = signs(weight.shape[-1], config.rotation_seed).to(weight.device, torch.float16)
        act = sign if act is None else act * sign
    if act is None:
        return weight, inner, None, 0
    w = weight.detach() / act.to(torch.float32)
    return rotate(w, block) if block else w, inner, act, block


def to_inputs(x: Tensor, act: Tensor | None, block: int) -> Tensor:
    """What the rotated weight is multiplied with: ``x [..., K]`` times act_pre_scale, then rotated."""
    return rotate(x if act is None else x * act.to(x.dtype), block)
