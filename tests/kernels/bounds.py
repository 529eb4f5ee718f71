"""How far a product through integers may be from the exact one: a share of the size of what is summed, by dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounding of the result in its dtype, plus fixed-point activations and float32 sums.
BOUNDS = {torch.float32: 2**-21, torch.bfloat16: 2**-8 + 2**-14, torch.float16: 2**-11 + 2**-14}
# Tables: activations and values have digits of 7 bits, three for float32, else two.
TABLE_BOUNDS = {torch.float32: 2**-19, torch.bfloat16: 2**-8 + 2**-12, torch.float16: 2**-11 + 2**-12}


def seen(x: Tensor) -> Tensor:
    """``|x|``, and a quarter of the largest of its 128 columns where that is more: integers have one step for them."""
    x = x.abs()
    top = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128)).amax(-1)
    return torch.maximum(x, top.repeat_interleave(128, -1)[..., : x.shape[-1]] / 4)


def size_of_sums(x: Tensor, span: Tensor, scale: Tensor | None = None) -> Tensor:
    """``[M, N]`` from ``x [M, K]`` and ``span [N, K]``, in float64. ``scale [N, K]``: that of axis 0, which activations
    are multiplied with before they become integers."""
    x, span = x.double(), span.double()
    if scale is None:
        return seen(x) @ span.T
    return torch.stack([seen(x * s) @ (row / s) for s, row in zip(scale.double(), span, strict=True)], dim=-1)
