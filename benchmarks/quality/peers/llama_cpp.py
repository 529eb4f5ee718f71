"""llama.cpp's types, quantized by its own library (llama-cpp-python), without and with an importance matrix.

The k-quants and the IQ types need rows of a multiple of 256, which these models do not have: llama.cpp would fall back
to larger types. Here rows are laid end to end, so that every weight gets the type asked for, at its own bits; the
importance matrix, the mean of x^2 of each input as llama-imatrix takes it, is laid end to end with them.
"""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor, nn

from benchmarks.quality.method import Method, Quantized, by_layer, replace
from benchmarks.quality.task import Task, second_moments

TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
WITH_MATRIX = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "Q4_0", "Q4_1", "IQ4_NL", "Q4_K", "Q5_0",
)  # fmt: skip


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'llama_cpp'")
    library = ctypes.CDLL(str(Path(next(iter(spec.submodule_search_locations))) / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def _quantize(library: ctypes.CDLL, w: Tensor, name: str, importance: Tensor | None = None) -> Quantized:
    """``w [N, K]`` as the type ``name`` reads back; importance: float32 ``[K]``."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    flat = np.ascontiguousarray(w.float().numpy()).reshape(-1)
    out = np.zeros(flat.size // block * size, np.uint8)
    matrix = None if importance is None else np.tile(importance.numpy().astype(np.float32), len(w))
    pointer = None if matrix is None else matrix.ctypes.data
    done = library.ggml_quantize_chunk(int(kind), flat.ctypes.data, out.ctypes.data, 0, 1, flat.size, pointer)
    if done != out.nbytes:
        raise ValueError(f"{name}: {done} bytes written, {out.nbytes} expected")
    return Quantized(torch.from_numpy(dequantize(out, kind).copy()).reshape(w.shape), 8.0 * out.nbytes)


def _with_matrix(library: ctypes.CDLL, model: nn.Module, task: Task, name: str) -> float:
    bits, moments = 0.0, second_moments(task.model, task.layers, task.tuning)
    for layer_name in task.layers:
        layer = model.get_submodule(layer_name)
        got = _quantize(library, layer.weight.detach(), name, moments[layer_name].diagonal())
        replace(layer, got.weight)
        bits += got.bits
    return bits


def methods() -> list[Method]:
    library = _library()
    width = {name: int(name.removeprefix("I")[1]) for name in (*TYPES, *WITH_MATRIX)}
    plain = [Method(f"llama.cpp {t}", width[t], by_layer(lambda w, t=t: _quantize(library, w, t))) for t in TYPES]
    return plain + [
        Method(f"llama.cpp {t}, imatrix", width[t], lambda m, task, t=t: _with_matrix(library, m, task, t), data="text")
        for t in WITH_MATRIX
    ]
