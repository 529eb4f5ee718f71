"""The hqq library's linear, 4 bits in groups of 64, with its codes rounded to nearest (its solver takes 35 s here)."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere


def contenders(w: Tensor) -> list[Contender]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError as error:
        raise NotHere(str(error)) from None
    N, K = w.shape
    linear = torch.nn.Linear(K, N, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    config["weight_quant_params"]["optimize"] = False
    layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    nbytes = layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes

    # One copy: a run writes the dense weight out, which clears the caches by itself.
    def bind(x: Tensor) -> Callable[[], Tensor]:
        return lambda: layer(x)

    return [Contender("hqq", "peer", 4, "float32", nbytes, bind, lambda: layer.dequantize())]
