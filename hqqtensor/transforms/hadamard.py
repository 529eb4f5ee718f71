"""Random Hadamard rotation of a weight's inputs.

Q = H D, with D random signs and H a normalised Hadamard matrix, is orthogonal: W x = (W Q^T) (Q x). It mixes each
input with others, so that no column or single weight is much larger than the others of its group (QuIP#, Tseng et al.
2024, arXiv 2402.04396; QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). in_features that are no power of two are
rotated in blocks of the largest power of two that divides them. The signs are stored in ``act_pre_scale``, multiplied
by column scales where there are any; of H only the length of its blocks is stored.
"""

import torch
from torch import Tensor

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
