"""A GGUF file: its metadata and where its tensors lie, every number held against the file's size before it is used.

The gguf package reads the same files, but trusts lengths: an array that claims 2**60 entries keeps it busy for ever.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.ops.checks import LARGEST
from hqqtensor.serialization.layout import CheckpointError

BLOCKS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip
"""Types that are read: number in the file, weights a block, bytes a block."""

_OTHERS = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_NAMES = _OTHERS | {number: name for name, (number, _, _) in BLOCKS.items()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MOST = 2**16
"""Bound on the number of tensors, metadata entries and arrays, and on the bytes of a name."""
_MOST_TEXTS = 2**22
"""Bound on the number of texts in arrays. The largest vocabularies with their merges have a million; to step over this
many takes a second."""
_READ = 64 * 2**20  # bytes at a time, so that an interrupt ends it soon
_LONGEST = 2**20
"""Bytes of the longest text that is read."""


@dataclass(frozen=True)
class Unread:
    """An array of ``count`` values, or a text of so many bytes, in the metadata. Nothing here needs one, and as Python
    objects it would take many times the file."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: shape in torch's order (rows first), offset and bytes within the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata (arrays and long texts as ``Unread``) and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def bytes_of(self, tensor: GgufTensor) -> Tensor:
        """The tensor's bytes, uint8, read from the file; CheckpointError where it was cut short since it was opened."""
        # Not mapped: codes are packed anew at once, and a mapped file that is cut short ends the process.
        data = torch.empty(tensor.nbytes, dtype=torch.uint8)
        target, done = data.numpy().data, 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(tensor.offset)
                while done < tensor.nbytes and (got := file.readinto(target[done : done + _READ])):
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if done < tensor.nbytes:
            raise CheckpointError(f"{self.path}: ends within {tensor.name}; it was cut short since it was opened")
        return data


def open_gguf(path: str | os.PathLike) -> GgufFile:
    """Read the header of a little-endian GGUF file, version 2 or 3; CheckpointError for anything that does not fit."""
    path = Path(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Header(path, view).read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


class _Header:
    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.at = path, view, 0
        self.arrays, self.texts = 0, 0

    def read(self) -> GgufFile:
        if self._take(4) != b"GGUF":
            raise ValueError("is no GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not read; 2 and 3, little-endian, are")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > _MOST:
            raise ValueError(f"claims {tensors} tensors and {entries} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            if key in metadata:
                raise ValueError(f"metadata {key!r} is there twice")
            metadata[key] = self._value(self._number("I"))
        if metadata.get("split.count", 1) != 1:
            raise ValueError("is one part of several; join them (llama-gguf-split --merge)")
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > _MOST:
            raise ValueError(f"bad general.alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            if name in placed:
                raise ValueError(f"tensor {name!r} is there twice")
            placed[name] = self._place(name, shape, number, start, offset, alignment)
        return GgufFile(self.path, metadata, placed)

    def _place(
        self, name: str, shape: tuple[int, ...], number: int, start: int, offset: int, alignment: int
    ) -> GgufTensor:
        kind = _NAMES.get(number, f"number {number}")
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name!r} is of type {kind}; {', '.join(BLOCKS)} are read")
        _, block, size = BLOCKS[kind]
        count = math.prod(shape)
        if not shape or not all(0 < extent <= LARGEST for extent in shape) or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of type {kind} has shape {list(shape)}")
        first, nbytes = start + offset, count // block * size
        if offset % alignment or first + nbytes > len(self.view):
            raise ValueError(f"tensor {name!r} lies at {first} with {nbytes} bytes, in a file of {len(self.view)}")
        return GgufTensor(name, kind, shape, first, nbytes)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._text(), self._number("I")
        if not 0 < rank <= 4:
            raise ValueError(f"tensor {name!r} claims {rank} dimensions")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            length = self._number("Q")
            if length <= _LONGEST:
                return self._decoded(length)
            self._skip(length)
            return Unread(length)
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        return self._array(0)

    def _array(self, depth: int) -> Unread:
        """Step over an array, each length held against the bytes that are left."""
        kind, count = self._number("I"), self._number("Q")
        self.arrays += 1
        if self.arrays > _MOST:  # arrays of arrays: no model has them
            raise ValueError(f"has over {_MOST} arrays")
        if count > len(self.view) - self.at:  # each takes a byte at the least
            raise ValueError(f"an array claims {count} entries")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            self._skip_texts(count)
        elif kind == _ARRAY and depth < 2:
            for _ in range(count):
                self._array(depth + 1)
        else:
            raise ValueError(f"metadata of unknown type {kind}")
        return Unread(count)

    def _skip_texts(self, count: int) -> None:
        """Read the lengths alone; a vocabulary has hundreds of thousands, so the loop does as little as it can."""
        self.texts += count
        if self.texts > _MOST_TEXTS:
            raise ValueError(f"has {self.texts} texts in arrays, over {_MOST_TEXTS}")
        unpack, view, at = _LENGTH.unpack_from, self.view, self.at
        try:
            for _ in range(count):
                at += 8 + unpack(view, at)[0]
        except (struct.error, OverflowError):
            at = len(view) + 1
        self._skip(at - self.at)

    def _text(self) -> str:
        length = self._number("Q")
        if _MOST < length <= len(self.view) - self.at:
            raise ValueError(f"a name has {length} bytes")
        return self._decoded(length)

    def _decoded(self, length: int) -> str:
        return self._take(length).decode("utf-8", errors="replace")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        self._skip(count)
        return self.view[self.at - count : self.at]

    def _skip(self, count: int) -> None:
        if count > len(self.view) - self.at:
            raise ValueError("is cut short")
        self.at += count
