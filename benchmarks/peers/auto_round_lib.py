"""Intel's auto-round-lib (PyPI ``auto-round-lib``): integer codes of 2 to 8 bits, computed in int8 or float32.

Its bfloat16 ends in an illegal instruction on the machines that were tried.
"""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies

GROUP = 64
BITS = (4, 3, 2)
COMPUTE = {"fp32": "float32", "int8": "int8"}


def _contender(ark: Any, w: Tensor, nbits: int, compute: str) -> Contender:
    N, K = w.shape
    largest = 2 ** (nbits - 1) - 1
    groups = w.reshape(N, K // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / largest
    codes = (groups / scale).round().to(torch.int8)
    dense = (codes * scale).reshape(N, K)
    # It takes codes as [K, N], scales as [groups, N].
    by_column, scales = codes.reshape(N, K).T.contiguous(), scale[..., 0].T.contiguous()
    names = (compute, f"int{nbits}", "fp32", False)
    nbytes = N * K * nbits // 8 + scales.nbytes
    packed = ark.repack_quantized_weight(by_column, scales, torch.empty(0, dtype=torch.int8), GROUP, *names)
    weights = copies(packed, nbytes, torch.clone)
    bias = torch.zeros(1, N)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        turns = itertools.cycle(weights)
        return lambda: ark.woqgemm(x, next(turns), bias, N, K, GROUP, *names)

    name = f"auto-round-lib {nbits}-bit {compute}"
    return Contender(name, "peer", nbits, COMPUTE[compute], nbytes, bind, lambda: dense, "symmetric")


def contenders(w: Tensor) -> list[Contender]:
    if importlib.util.find_spec("auto_round_kernel") is None:
        raise NotHere("No module named 'auto_round_kernel': pip install auto-round-lib")
    import auto_round_kernel

    if w.shape[1] % GROUP:
        raise NotHere(f"groups of {GROUP} do not divide {w.shape[1]} columns")
    four = [_contender(auto_round_kernel, w, 4, compute) for compute in COMPUTE]
    return [*four, *(_contender(auto_round_kernel, w, nbits, "int8") for nbits in BITS[1:])]
