"""bitsandbytes' fused product with NF4 in groups of 64, for processors that compute in bfloat16."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies_needed


def contenders(w: Tensor) -> list[Contender]:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise NotHere(str(error)) from None
    N, K = w.shape
    nbytes = N * K // 2 + N * K // 64 * 4
    layers = []
    for _ in range(copies_needed(nbytes)):
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4")
        layers.append(layer.to("cpu").eval())
    if not layers[0].support_avx512bf16_for_cpu:
        raise NotHere("bitsandbytes has no fused product for this processor")
    packed = layers[0].weight
    dense = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float().reshape(N, K)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        turns, rows = itertools.cycle(layers), x.bfloat16()
        return lambda: next(turns)(rows)

    return [Contender("bitsandbytes NF4 bf16", "peer", 4, "bfloat16", nbytes, bind, lambda: dense)]
