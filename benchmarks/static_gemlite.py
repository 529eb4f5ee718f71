"""gemlite's kernels for a machine without a GPU: its modules are loaded with a stand-in for the device they ask about.

Only the kernels' sources are used, compiled with gemlite's usual settings: float16, asymmetric groups of 64, codes
below 8 bits packed into int32.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.static_compile import Compiled, compile_kernel

GROUP, N, K = 64, 4096, 4096


def why_missing() -> str | None:
    """None, or why gemlite cannot be compared with."""
    return None if importlib.util.find_spec("gemlite") else "gemlite is not installed (pip install --no-deps gemlite)"


@contextmanager
def _no_device() -> Iterator[None]:
    properties = SimpleNamespace(name="NVIDIA H100", multi_processor_count=132)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_benchmarker=lambda: None,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448}),
    )
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda *a: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *a: properties),
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        yield


def _module(name: str) -> ModuleType:
    """A kernel module, without the package's own start-up, which needs a device."""
    spec = importlib.util.find_spec("gemlite")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for package, folder in (("gemlite", root), ("gemlite.triton_kernels", root / "triton_kernels")):
        if package not in sys.modules:
            shell = ModuleType(package)
            shell.__path__, shell.__spec__ = [str(folder)], spec
            sys.modules[package] = shell
    with _no_device():
        return importlib.import_module(f"gemlite.triton_kernels.{name}")


def _constants(nbits: int) -> dict[str, Any]:
    import triton.language as tl

    elements = 32 // nbits if nbits < 8 else 1
    return {
        "N": N, "K": K, "W_nbits": nbits, "group_size": GROUP, "unpack_mask": 2**nbits - 1,
        "elements_per_sample": elements, "type_id": 0, "use_prehook": False,
        "stride_am": K, "stride_ak": 1, "stride_bk": N, "stride_bn": 1, "stride_cm": N, "stride_cn": 1,
        "stride_meta_a_m": 0, "stride_meta_a_g": 0, "stride_meta_g": N, "stride_meta_n": 1,
        "input_dtype": tl.float16, "output_dtype": tl.float16, "acc_dtype": tl.float32, "meta_dtype": tl.float16,
        "channel_scale_mode": 0, "W_group_mode": 3, "zero_is_scalar": False, "data_contiguous": True,
        "dump_b_val": 0, "meta_evict_policy": "", "atomic_mode": "relaxed", "a_evict": "evict_last",
        "b_evict": "evict_first", "block_quant_size": 128, "EVEN_M": True, "EVEN_K": True, "EVEN_N": True,
        "A_load_order": 0, "dot_prod_mode": 0, "load_scales_as_block": False, "a_sizeof": 2, "b_sizeof": 4,
    }  # fmt: skip


def _compile(module: str, kernel: str, nbits: int, arch: str, warps: int, **tile: Any) -> Compiled:
    function = getattr(_module(module), kernel)
    while not isinstance(function, triton.runtime.JITFunction):
        function = function.fn
    names = [p.name for p in function.params]
    constants = {name: value for name, value in {**_constants(nbits), **tile}.items() if name in names}
    for parameter in function.params:
        if parameter.name not in constants and parameter.has_default:
            constants[parameter.name] = parameter.default
    packed = "*i32" if nbits < 8 else "*u8"
    types = {name: "*fp16" for name in names if name.endswith("_ptr")} | {
        "b_ptr": packed,
        "M": "i32",
        "M_CLOSEST": "i32",
    }
    types["mapping_ptr"] = "*i32"
    return compile_kernel(function, types, constants, arch, {"num_warps": warps}, aligned=("N", "K"))


def gemv(nbits: int, arch: str, block_k: int, block_n: int, warps: int) -> tuple[Compiled, float]:
    """The kernel gemlite takes at M=1 (REVSPLITK below 8 bits, SPLITK at 8) and its weights a thread."""
    tile = {"BLOCK_SIZE_M": 1, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k}
    wide = 64 if arch.startswith("gfx") else 32
    if nbits < 8:
        found = _compile("gemv_revsplitK_kernels", "gemv_INT_revsplitK_kernel", nbits, arch, warps, **tile)
        return found, 2 * block_k * block_n / (warps * wide)
    tile |= {"SPLIT_K": 1, "GROUP_SIZE_M": 8}
    found = _compile("gemv_splitK_kernels", "gemv_INT_splitK_kernel", nbits, arch, warps, **tile)
    return found, block_k * block_n / (warps * wide)


def gemv_cost(nbits: int, arch: str) -> float:
    """Instructions a weight of gemlite's cheapest tile at M=1.

    REVSPLITK has no loop. What a tile of twice the rows takes more is what its weights cost, without what starts and
    ends the kernel; where the whole kernel comes out cheaper still, that counts.
    """
    best = float("inf")
    for warps, block_n in ((1, 64), (1, 128), (1, 256), (2, 256)):
        if nbits < 8:
            small, few = gemv(nbits, arch, 16, block_n, warps)
            large, many = gemv(nbits, arch, 32, block_n, warps)
            slope = (large.instructions - small.instructions) / (many - few)
            best = min(best, slope, small.instructions / few, large.instructions / many)
        else:
            for block_k in (16, 32):
                found, weights = gemv(nbits, arch, block_k, block_n, warps)
                best = min(best, found.instructions / weights)
    return best


def gemm(nbits: int, arch: str, rows: int) -> tuple[Compiled, float, int]:
    """The kernel gemlite takes at M = rows (split-K to 63 rows), its weights a thread and a turn, and its warps."""
    wide = 64 if arch.startswith("gfx") else 32
    tile = {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8, "num_stages": 3, "NUM_STAGES": 3}
    if rows < 64:
        tile |= {"BLOCK_SIZE_M": 16, "SPLIT_K": 1}
        found = _compile("gemm_splitK_kernels", "gemm_splitK_INT_kernel", nbits, arch, 4, **tile)
    else:
        tile |= {"BLOCK_SIZE_M": 64}
        found = _compile("gemm_kernels", "gemm_INT_kernel", nbits, arch, 4, **tile)
    return found, 64 * 64 / (4 * wide), 4
