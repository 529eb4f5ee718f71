"""How far a product may be from the exact one: a share of the size of what is summed, by path.

docs/numerics.md states the same numbers; test_cpu_numerics.py compares the page with this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_UNITS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What rounding to a dtype changes, at most, as a share of the number."""

# Rounding of the result in its dtype, plus fixed-point activations and float32 sums.
BOUNDS = {dtype: HALF_UNITS[dtype] + 2**-14 for dtype in (torch.bfloat16, torch.float16)} | {torch.float32: 2**-21}
# Tables: activations and values have digits of 7 bits, three for float32, else two.
TABLE_BOUNDS = {dtype: HALF_UNITS[dtype] + 2**-12 for dtype in (torch.bfloat16, torch.float16)} | {
    torch.float32: 2**-19
}
# float32 in 16 bits, as torch.set_float32_matmul_precision("high") allows.
HIGH_BOUND, HIGH_TABLE_BOUND = 2**-14, 2**-12
# Gradients are products with weights rounded to the dtype.
GRADIENT_BOUNDS = {dtype: 2 * half + 2**-20 for dtype, half in HALF_UNITS.items()}


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


def half_steps(x: Tensor, features: int) -> Tensor:
    """Half of the step of 8 bits of each number of ``[rows, K]``, of the largest of ``features`` neighbours."""
    top = F.pad(x.abs(), (0, -x.shape[-1] % features)).unflatten(-1, (-1, features)).amax(-1)
    return top.repeat_interleave(features, -1)[..., : x.shape[-1]] / 254


def int8_rounding(x: Tensor, w: Tensor, features: int, scale: Tensor | None = None) -> Tensor:
    """What rounding activations to 8 bits may change, ``[M, N]`` in float64: half a step, the largest of ``features``
    columns / 254, times each weight of w ``[N, K]``. ``scale``: as above."""

    x, w = x.double(), w.double().abs()
    if scale is None:
        return half_steps(x, features) @ w.T
    return torch.stack(
        [half_steps(x * s, features) @ (row / s) for s, row in zip(scale.double(), w, strict=True)], dim=-1
    )


def weight_rounding(x: Tensor, largest: Tensor, features: int) -> Tensor:
    """What rounding weights to 8 bits may change, ``[M, N]`` in float64, in a product with 8-bit activations: half a
    step times each activation. ``largest [N, K]``: the largest number that a code there can stand for."""
    x = x.double()
    return (x.abs() + half_steps(x, features)) @ half_steps(largest.double(), features).T
