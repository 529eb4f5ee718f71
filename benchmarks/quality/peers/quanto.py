"""optimum-quanto's qint4 and qint2 with its HQQ optimizer and its default one, groups of 64."""

from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, quantize_weight
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer


def _quantize(w: Tensor, qtype: object, nbits: int, optimizer: object) -> Quantized:
    scale, shift = optimizer(w, qtype, 0, 64)  # type: ignore[operator]
    scale, shift = scale.half().float(), shift.half().float()
    return Quantized(quantize_weight(w, qtype, 0, scale, shift, 64).dequantize(), affine_bits(w, nbits, 64))


def methods() -> list[Method]:
    return [
        Method(f"quanto {name} {b}-bit g64", b, by_layer(lambda w, q=q, b=b, o=make: _quantize(w, q, b, o())))
        for name, make in (("max", MaxOptimizer), ("hqq", HqqOptimizer))
        for b, q in ((4, qint4), (2, qint2))
    ]
