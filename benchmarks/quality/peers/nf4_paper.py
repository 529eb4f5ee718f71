"""NF4 (Dettmers et al. 2023, arXiv 2305.14314), our own plain reading: absmax scales in 16 bits.

Groups of 32 cost 4.5 bits as a 4-bit affine group of 64 does; groups of 64 cost 4.25.
"""

import torch
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer

# Appendix E of the paper.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def _quantize(w: Tensor, group_size: int) -> Quantized:
    groups = w.reshape(-1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).half().float().clamp_min(2**-24)
    codes = ((groups / scale).unsqueeze(-1) - NF4).abs().argmin(-1)
    return Quantized((NF4[codes] * scale).reshape(w.shape), affine_bits(w, 4, group_size, metadata=16))


def methods() -> list[Method]:
    return [Method(f"NF4 g{size} (paper)", 4, by_layer(lambda w, s=size: _quantize(w, s))) for size in (64, 32)]
