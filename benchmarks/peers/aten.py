"""torch's own packed products on a CPU, and its dense ones. Both packed ones are at their best with bfloat16."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import Contender, copies

GROUP = 64


def dense(w: Tensor, dtype: torch.dtype) -> Contender:
    """torch's dense product in ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    kept = w.to(dtype)
    turns = itertools.cycle(copies(kept, kept.nbytes, Tensor.clone))

    def bind(x: Tensor) -> Callable[[], Tensor]:
        x = x.to(dtype)
        out = torch.empty(x.shape[0], w.shape[0], dtype=dtype)
        return lambda: torch.mm(x, next(turns).T, out=out)

    bits = 8 * kept.element_size()
    return Contender(f"dense {'fp32' if bits == 32 else 'bf16'}", "dense", bits, name, kept.nbytes, bind, kept.float)


def int4pack(w: Tensor) -> Contender:
    """``_weight_int4pack_mm_for_cpu``: 4 bits, groups of 64, a scale and a zero point each in bfloat16."""
    N, K = w.shape
    groups = w.view(N, K // GROUP, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (groups / scale.float()).round_().clamp_(-8, 7).add_(8).to(torch.int32).view(N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.cat([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    turns = itertools.cycle(copies((packed, both), packed.nbytes + both.nbytes, lambda p: (p[0].clone(), p[1].clone())))
    small = codes.to(torch.uint8)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        x = x.bfloat16()

        def run() -> Tensor:
            weight, scales = next(turns)
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)

        return run

    def as_dense() -> Tensor:
        return ((small.view_as(groups).float() - 8) * scale.float()).view(N, K)

    nbytes = packed.nbytes + both.nbytes
    return Contender("ATen int4pack", "peer", 4, "bfloat16", nbytes, bind, as_dense)


def int8pack(w: Tensor) -> Contender:
    """``_weight_int8pack_mm``: 8 bits, one bfloat16 scale a row."""
    scale = (w.abs().amax(1) / 127).bfloat16()
    codes = (w / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    turns = itertools.cycle(copies(codes, codes.nbytes, Tensor.clone))

    def bind(x: Tensor) -> Callable[[], Tensor]:
        x = x.bfloat16()
        return lambda: torch.ops.aten._weight_int8pack_mm(x, next(turns), scale)

    def as_dense() -> Tensor:
        return codes.float() * scale.float()[:, None]

    return Contender("ATen int8pack", "peer", 8, "bfloat16", codes.nbytes + scale.nbytes, bind, as_dense)


def contenders(w: Tensor) -> list[Contender]:
    return [int4pack(w), int8pack(w)]
