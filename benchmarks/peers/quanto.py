"""optimum-quanto's qint4 linear."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere


def contenders(w: Tensor) -> list[Contender]:
    try:
        from optimum.quanto import QLinear, freeze, qint4
    except ImportError as error:
        raise NotHere(str(error)) from None
    N, K = w.shape
    linear = torch.nn.Linear(K, N, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    layer = QLinear.from_module(linear, weights=qint4)
    freeze(layer)
    nbytes = N * K // 2 + 4 * sum(t.numel() for t in (layer.weight._scale, layer.weight._shift))

    # One copy: a run writes the dense weight out, which clears the caches by itself.
    def bind(x: Tensor) -> Callable[[], Tensor]:
        return lambda: layer(x)

    return [Contender("quanto qint4", "peer", 4, "float32", nbytes, bind, lambda: layer.weight.dequantize())]
