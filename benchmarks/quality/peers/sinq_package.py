"""The sinq package 0.2.0 (arXiv 2509.22944) on the CPU with its default, 8-bit metadata."""

import importlib.util
import sys
import types

from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer

for _module, _names in {"termcolor": ["colored"], "datasets": ["load_dataset"]}.items():
    # Imported by the package for a coloured warning and for its calibrated variant: neither is used here.
    if _module not in sys.modules and importlib.util.find_spec(_module) is None:
        sys.modules[_module] = types.SimpleNamespace(**dict.fromkeys(_names))  # type: ignore[assignment]
from sinq.quantizer import Quantizer  # noqa: E402


def _quantize(w: Tensor, nbits: int, group_size: int) -> Quantized:
    codes, meta = Quantizer.quantize(
        w, None, nbits=nbits, group_size=group_size, axis=1, bitpack=False, device="cpu",
        round_zero=nbits == 4, method="sinq_quantAux",
    )  # fmt: skip
    meta["scale2"] = meta["scale2"].half().float()
    weight = Quantizer.dequantize(codes, meta).reshape(w.shape)
    groups = w.numel() / group_size
    # Scales in 8 bits share 32-bit scale and offset by 32; zero points share one pair by weight.
    metadata = 16 * groups + 64 * groups / 32 + 64
    return Quantized(weight, affine_bits(w, nbits, group_size, 0) + metadata + 16 * w.shape[1])


def methods() -> list[Method]:
    return [
        Method(f"SINQ {b}-bit g{size} 8-bit meta", b, by_layer(lambda w, b=b, s=size: _quantize(w, b, s)))
        for b in (4, 3, 2)
        for size in (64, 32)
    ]
