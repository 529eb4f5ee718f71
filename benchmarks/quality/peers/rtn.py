"""Round to nearest, groups of 64, 16-bit scale and zero point: the floor."""

from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer
from hqqtensor import HqqConfig, HQQTensor


def _quantize(w: Tensor, nbits: int) -> Quantized:
    return Quantized(HQQTensor.from_hp(w, HqqConfig(nbits, 64, solver="rtn")).dequantize(), affine_bits(w, nbits, 64))


def methods() -> list[Method]:
    return [Method(f"rtn {b}-bit g64", b, by_layer(lambda w, b=b: _quantize(w, b))) for b in (8, 4, 3, 2)]
