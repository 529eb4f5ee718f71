"""The hqq library (mobiusml/hqq, installed), groups of 64 along inputs, scale and zero point kept in 16 bits."""

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer


def _quantize(w: Tensor, nbits: int) -> Quantized:
    codes, meta = Quantizer.quantize(
        w, nbits=nbits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32, round_zero=nbits == 4
    )
    for key in ("scale", "zero"):  # the library stores them in its compute dtype, 16 bits in use
        meta[key] = meta[key].half().float()
    # Counted densely packed: the library itself spends 3.2 bits on a 3-bit code.
    return Quantized(Quantizer.dequantize(codes, meta).reshape(w.shape), affine_bits(w, nbits, 64))


def methods() -> list[Method]:
    return [Method(f"hqq {b}-bit g64", b, by_layer(lambda w, b=b: _quantize(w, b))) for b in (8, 4, 3, 2)]
