"""llama.cpp's matrix product, through the ggml library inside the package ``llama-cpp-python``.

Weights go where llama.cpp would put them: into the first of the CPU's extra buffer types (which repack a weight for
wide kernels) that takes the product, else into the plain one. Activations are float32; llama.cpp turns them into 8-bit
integers.
"""

import ctypes
import functools
import importlib.util
import itertools
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies_needed

# enum ggml_type: its number, and bits of a code.
TYPES = {
    "Q4_0": (2, 4), "Q4_1": (3, 4), "Q5_0": (6, 5), "Q4_K": (12, 4), "Q6_K": (14, 6), "Q8_0": (8, 8), "IQ4_NL": (20, 4),
}  # fmt: skip
LINEAR = ("Q4_0", "Q4_1", "Q4_K", "Q8_0")
_F32, _CPU = 0, 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _quiet(level: int, text: bytes, data: int) -> None:
    """What ggml calls to log."""


# Function: result, arguments. None is void.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class _Ggml:
    """The functions of ``_SIGNATURES``, looked up in the package's shared libraries; one CPU backend."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise NotHere("No module named 'llama_cpp'")
        folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
        found = {p.name.split(".")[0]: p for p in sorted(folder.glob("*ggml*.*"), reverse=True)}
        try:
            names = ("libggml-base", "libggml-cpu", "libggml")
            self.libraries = [ctypes.CDLL(str(found[name]), ctypes.RTLD_GLOBAL) for name in names]
        except (KeyError, OSError) as error:
            raise NotHere(f"no ggml library in {folder}: {error}") from None
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name.removeprefix("ggml_"), self.function(name, result, arguments))
        self.log_set(ctypes.cast(_quiet, c_void_p), None)  # it would print a line for each weight that it repacks
        self.device = self.backend_dev_by_type(_CPU)
        self.backend = self.backend_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not in _SIGNATURES")

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        for library in self.libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                return function
        raise NotHere(f"this ggml has no {name}")

    def context(self, tensors: int, graphs: int = 0) -> int:
        size = tensors * self.tensor_overhead() + graphs * self.graph_overhead_custom(8, False)
        return self.init(_InitParams(size, None, True))

    def buffer_types(self) -> list[int]:
        """The CPU's extra buffer types in their order, then the plain one."""
        kinds = []
        address = self.backend_reg_get_proc_address(
            self.backend_dev_backend_reg(self.device), b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
            for i in itertools.count():
                if not extra[i]:
                    break
                kinds.append(extra[i])
        return [*kinds, self.backend_dev_buffer_type(self.device)]


@functools.cache
def ggml() -> _Ggml:
    return _Ggml()


def _release(context: int, buffer: int) -> None:
    ggml().backend_buffer_free(buffer)
    ggml().free(context)


class Weight:
    """A packed weight ``[N, K]`` where llama.cpp would keep it; ``place`` names that buffer type."""

    def __init__(self, packed: Tensor, kind: int, N: int, K: int) -> None:
        lib = ggml()
        for buffer_type in lib.buffer_types():
            self.context = lib.context(3)
            self.tensor = lib.new_tensor_2d(self.context, kind, K, N)
            buffer = lib.backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
            if not buffer:
                lib.free(self.context)
                continue
            x = lib.new_tensor_2d(self.context, _F32, K, 1)
            if lib.backend_dev_supports_op(lib.device, lib.mul_mat(self.context, self.tensor, x)):
                break
            _release(self.context, buffer)
        else:
            raise NotHere(f"llama.cpp has no product for ggml type {kind}")
        weakref.finalize(self, _release, self.context, buffer)
        self.place = lib.backend_buft_name(buffer_type).decode()
        lib.backend_tensor_set(self.tensor, packed.data_ptr(), 0, packed.nbytes)


class Products:
    """Graphs of one product each, ``weights[i]`` times the same activations; ``run(i)`` gives the result [M, N]."""

    def __init__(self, weights: list[Weight], x: Tensor, N: int) -> None:
        lib = ggml()
        M, K = x.shape
        self.weights = weights
        context = lib.context(2 * len(weights) + 1, len(weights))
        source = lib.new_tensor_2d(context, _F32, K, M)
        results = [lib.mul_mat(context, w.tensor, source) for w in weights]
        buffer = lib.backend_alloc_ctx_tensors_from_buft(context, lib.backend_dev_buffer_type(lib.device))
        weakref.finalize(self, _release, context, buffer)
        lib.backend_tensor_set(source, x.contiguous().data_ptr(), 0, x.nbytes)
        self.graphs, self.results = [], []
        for result in results:
            self.graphs.append(lib.new_graph_custom(context, 8, False))
            lib.build_forward_expand(self.graphs[-1], result)
            raw = (c_float * (M * N)).from_address(lib.get_data(result))
            self.results.append(torch.frombuffer(raw, dtype=torch.float32).view(M, N))

    def run(self, i: int) -> Tensor:
        lib = ggml()
        lib.backend_cpu_set_n_threads(lib.backend, torch.get_num_threads())
        if lib.backend_graph_compute(lib.backend, self.graphs[i]):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return self.results[i]


def quantize(w: Tensor, name: str) -> Tensor:
    """``w`` ``[N, K]`` float32 in the ggml type called ``name``, as bytes."""
    lib, kind = ggml(), TYPES[name][0]
    N, K = w.shape
    packed = torch.empty(N * lib.row_size(kind, K), dtype=torch.uint8)
    lib.quantize_chunk(kind, w.contiguous().data_ptr(), packed.data_ptr(), 0, N, K, None)
    return packed


def dequantize(packed: Tensor, name: str, N: int, K: int) -> Tensor:
    out = torch.empty(N, K)
    lower = name.lower() if name.startswith("IQ") else name[0].lower() + name[1:]
    row = ggml().function(f"dequantize_row_{lower}", None, [c_void_p, c_void_p, c_int64])
    row(packed.data_ptr(), out.data_ptr(), N * K)
    return out


def _contender(w: Tensor, name: str) -> Contender:
    kind, nbits = TYPES[name]
    N, K = w.shape
    packed = quantize(w, name)
    weights = [Weight(packed, kind, N, K) for _ in range(copies_needed(packed.nbytes))]

    def bind(x: Tensor) -> Callable[[], Tensor]:
        products = Products(weights, x, N)
        turns = itertools.cycle(range(len(weights)))
        return lambda: products.run(next(turns))

    label = f"llama.cpp {name}"
    return Contender(
        label, "peer", nbits, "int8", packed.nbytes, bind, lambda: dequantize(packed, name, N, K), weights[0].place
    )


def contenders(w: Tensor) -> list[Contender]:
    return [_contender(w, name) for name in LINEAR]
