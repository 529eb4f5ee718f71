"""The tensors of a safetensors file as they lie in it, mapped into memory.

safetensors' own ``get_tensor`` gives the same tensors, but its version 0.8.0 loses two Python integers with each of
them: a program that opens models again and again would grow.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""The dtypes by the names that safetensors has for them."""


def nbytes_of(described: Any) -> int:
    """The bytes of a tensor, of which ``safe_open``'s slice is given. KeyError where its dtype is not in ``DTYPES``."""
    return math.prod(described.get_shape()) * DTYPES[described.get_dtype()].itemsize


class MappedFile:
    """A safetensors file, mapped; its pages are copied when they are written to.

    place: the file. opened: the same file as ``safe_open`` gives it, which has checked it: the tensors follow each
    other without a gap and end with the file. RuntimeError where it cannot be mapped, KeyError where a dtype is not
    in ``DTYPES``.
    """

    def __init__(self, place: Path, opened: Any) -> None:
        self._opened = opened
        self._bytes = torch.UntypedStorage.from_file(str(place), False, os.stat(place).st_size)
        self._ends: dict[str, int] = {}
        end = self._bytes.nbytes()
        for name in reversed(opened.offset_keys()):
            self._ends[name] = end
            end -= nbytes_of(opened.get_slice(name))

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        described = self._opened.get_slice(name)
        end = self._ends[name]
        numbers = torch.asarray(self._bytes[end - nbytes_of(described) : end], dtype=torch.uint8)
        return numbers.view(DTYPES[described.get_dtype()]).reshape(described.get_shape())
