"""bitsandbytes' NF4 on the CPU, blocks of 64, absmax in 32 bits or, doubly quantized, in 8 bits."""

import bitsandbytes.functional as bnb
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, by_layer


def _quantize(w: Tensor, nested: bool) -> Quantized:
    codes, state = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    blocks = w.numel() / 64
    bits = 8 * blocks + 32 * (blocks / 256 + 1) if nested else 32 * blocks
    return Quantized(bnb.dequantize_4bit(codes, state).reshape(w.shape), 4 * w.numel() + bits)


def methods() -> list[Method]:
    kinds = (("NF4", False), ("NF4 double", True))
    return [Method(f"bitsandbytes {name}", 4, by_layer(lambda w, n=nested: _quantize(w, n))) for name, nested in kinds]
