"""bitsandbytes' 4-bit types on the CPU, blocks of 64, absmax in 32 bits or, doubly quantized, in 8 bits."""

import bitsandbytes.functional as bnb
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, by_layer


def _quantize(w: Tensor, kind: str, nested: bool) -> Quantized:
    codes, state = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type=kind, compress_statistics=nested)
    blocks = w.numel() / 64
    bits = 8 * blocks + 32 * (blocks / 256 + 1) if nested else 32 * blocks
    return Quantized(bnb.dequantize_4bit(codes, state).reshape(w.shape), 4 * w.numel() + bits)


def methods() -> list[Method]:
    kinds = (("NF4", "nf4", False), ("NF4 double", "nf4", True), ("FP4", "fp4", False))
    return [
        Method(f"bitsandbytes {name}", 4, by_layer(lambda w, k=kind, n=nested: _quantize(w, k, n)))
        for name, kind, nested in kinds
    ]
