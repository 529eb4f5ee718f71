"""optimum-quanto's qint4 and qint2 with its HQQ optimizer (its default one is round to nearest), groups of 64."""

from optimum.quanto import HqqOptimizer, qint2, qint4, quantize_weight
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer


def _quantize(w: Tensor, qtype: object, nbits: int) -> Quantized:
    scale, shift = (t.half().float() for t in HqqOptimizer()(w, qtype, 0, 64))
    return Quantized(quantize_weight(w, qtype, 0, scale, shift, 64).dequantize(), affine_bits(w, nbits, 64))


def methods() -> list[Method]:
    return [
        Method(f"quanto hqq {b}-bit g64", b, by_layer(lambda w, q=q, b=b: _quantize(w, q, b)))
        for b, q in ((4, qint4), (2, qint2))
    ]
