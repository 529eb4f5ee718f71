"""A GGUF file of the llama architecture as a dense model: what its codes stand for, a tensor at a time."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import llama_names, read_llama
from hqqtensor.streaming.source import Source, StoredTensor
from hqqtensor.tensor import HQQTensor


class GgufSource(Source):
    """The tensors of a GGUF file under transformers' names, all in ``dtype``. Closed by ``close``.

    dtype: float16 or float32 where all matrices of the file are in it, else bfloat16, which holds to 0.4 % what codes
    stand for. CheckpointError, naming the file, where it is damaged or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.gguf = open_gguf(path)
        self._names = llama_names(self.gguf)
        kinds = {tensor.kind for tensor in self.gguf.tensors.values() if len(tensor.shape) > 1}
        self.dtype = {"F32": torch.float32, "F16": torch.float16}.get("".join(kinds), torch.bfloat16)
        self.files, self.tensors = [path], {}
        for name, stored in self._names.items():
            entry = self.gguf.tensors[stored]
            nbytes = math.prod(entry.shape) * self.dtype.itemsize
            self.tensors[name] = StoredTensor(name, path, entry.offset, nbytes, self.dtype, entry.shape)
        self._handles = {path: os.open(path, os.O_RDONLY)}
        self._last: tuple[str, Tensor] | None = None

    def read(self, tensor: StoredTensor, first: int = 0, count: int | None = None) -> Tensor:
        """The whole tensor, or ``count`` of its first dimension from ``first`` on."""
        if self._last is None or self._last[0] != tensor.name:
            self._last = None
            values = read_llama(self.gguf, tensor.name, self._names[tensor.name])
            dense = values.dequantize(self.dtype) if isinstance(values, HQQTensor) else values.to(self.dtype)
            self._last = (tensor.name, dense)  # the rows that follow are asked for next
        dense = self._last[1]
        return dense.clone() if count is None else dense[first : first + count].clone()
