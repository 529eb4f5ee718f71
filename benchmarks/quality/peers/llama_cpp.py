"""llama.cpp's types, quantized by its own library (llama-cpp-python) without an importance matrix.

The k-quants need rows of a multiple of 256, which these two models do not have: llama.cpp would fall back to larger
types. Here rows are laid end to end, so that every weight gets the type asked for, at its own bits.
"""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, by_layer

TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'llama_cpp'")
    library = ctypes.CDLL(str(Path(next(iter(spec.submodule_search_locations))) / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def _quantize(library: ctypes.CDLL, w: Tensor, name: str) -> Quantized:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    flat = np.ascontiguousarray(w.float().numpy()).reshape(-1)
    out = np.zeros(flat.size // block * size, np.uint8)
    done = library.ggml_quantize_chunk(int(kind), flat.ctypes.data, out.ctypes.data, 0, 1, flat.size, None)
    if done != out.nbytes:
        raise ValueError(f"{name}: {done} bytes written, {out.nbytes} expected")
    return Quantized(torch.from_numpy(dequantize(out, kind).copy()).reshape(w.shape), 8.0 * out.nbytes)


def methods() -> list[Method]:
    library = _library()
    return [Method(f"llama.cpp {t}", int(t[1]), by_layer(lambda w, t=t: _quantize(library, w, t))) for t in TYPES]
