"""torchao's own HQQ step (scale and zero point of its intx weight-only path), groups of 64."""

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    _choose_qparams_and_quantize_affine_hqq,
)

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer


def _quantize(w: Tensor, nbits: int) -> Quantized:
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        w, nbits=nbits, group_size=64, axis=1, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    scale, zero = (t.half().float().reshape(-1, 1) for t in (scale, zero))
    weight = (codes.reshape(-1, 64).float() - zero) * scale
    return Quantized(weight.reshape(w.shape), affine_bits(w, nbits, 64))


def methods() -> list[Method]:
    return [Method(f"torchao hqq {b}-bit g64", b, by_layer(lambda w, b=b: _quantize(w, b))) for b in (4, 3, 2)]
