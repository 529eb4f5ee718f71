"""The files of a dense model: what their headers say, and the bytes of one tensor at a time.

Tensors are read with ``pread`` rather than through a mapping: a file that another process cuts short is then an error
that names it, where a mapping ends the process with SIGBUS.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.serialization.files import DEFAULT_NAME, checkpoint_files, index_path
from hqqtensor.serialization.layout import CheckpointError, read_json
from hqqtensor.serialization.mapped import DTYPES as KNOWN
from hqqtensor.whole_file import close_unchanged

DTYPES = {name: KNOWN[name] for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")}
"""The dtypes that are read and written here, by the names that safetensors has for them."""

_LARGEST_HEADER = 100_000_000  # as in safetensors
_READ = 64 * 2**20  # bytes at a time, so that a reader can be stopped
_SAMPLES, _SAMPLE = 16, 512  # numbers of a file that count for its identity


class NotStreamable(ValueError):
    """The model has to be opened whole; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes lie."""

    name: str
    file: Path
    begin: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source:
    """The tensors of a model directory by name, in the order of the files. Closed by ``close``.

    NotStreamable where the directory has no safetensors files, or tensors of a dtype that is not read here;
    CheckpointError, naming the file, where one is missing, cut short, or no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / DEFAULT_NAME
        if not path.is_file() and not index_path(path).is_file():
            raise NotStreamable(f"it has no {DEFAULT_NAME} and no index of shards")
        self.files = checkpoint_files(path)
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: dict[Path, int] = {}
        try:
            for file in self.files:
                self._handles[file] = _open(file)
                for tensor in _read_header(file, self._handles[file]):
                    self.tensors[tensor.name] = tensor
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            close_unchanged(self._handles.popitem()[1])

    def first_floating_dtype(self) -> torch.dtype:
        """That of the first floating-point tensor of the first file, which transformers takes for the model's."""
        of_first = [t for t in self.tensors.values() if t.file == self.files[0]]
        return next((t.dtype for t in of_first if t.dtype.is_floating_point), torch.float32)

    def identity(self) -> list[Any]:
        """Names, shapes, dtypes, and a sample of the numbers of each file."""
        tensors = [[t.name, str(t.dtype), list(t.shape), t.begin] for t in self.tensors.values()]
        samples = []
        for file in self.files:
            handle = self._handles[file]
            size = os.fstat(handle).st_size
            steps = range(_SAMPLES)
            samples += [os.pread(handle, _SAMPLE, size * step // _SAMPLES) for step in steps]
        return [tensors, samples]

    def read(self, tensor: StoredTensor, first: int = 0, count: int | None = None) -> Tensor:
        """The whole tensor, or ``count`` of its first dimension from ``first`` on. CheckpointError where bytes lack."""
        shape = tensor.shape if count is None else (count, *tensor.shape[1:])
        out = torch.empty(shape, dtype=tensor.dtype)
        if not out.numel():
            return out
        begin = tensor.begin + (0 if count is None else first * (tensor.nbytes // tensor.shape[0]))
        target = out.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self._handles[tensor.file], [target[done : done + _READ]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror or error})") from None
            if got == 0:
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name}; it was cut short since it was opened")
            done += got
        return out


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None


def _read_header(file: Path, handle: int) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file in the order in which they lie there."""
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little") if size >= 8 else 0
    if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        raise CheckpointError(f"{file}: not a whole safetensors file (a header of {length} bytes in a file of {size})")
    header = read_json(os.pread(handle, length, 8), f"{file}: its header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda t: t.begin)
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            raise CheckpointError(f"{file}: {tensor.name!r} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{file}: not a whole safetensors file (it should have {end} bytes and has {size})")
    yield from tensors


def _stored(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        good = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in numbers) and begin <= end
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise CheckpointError(f"{file}: the header's entry of {name!r} is damaged: {json.dumps(entry)[:100]}")
    if dtype not in DTYPES:
        raise NotStreamable(f"{name} in {file.name} is of dtype {dtype}")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise CheckpointError(f"{file}: {name!r} of {dtype} {list(shape)} does not take {end - begin} bytes")
    return StoredTensor(name, file, data + begin, end - begin, DTYPES[dtype], shape)


def by_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype; ValueError where it is not one of ``DTYPES``."""
    names: Mapping[torch.dtype, str] = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"tensors of {dtype} cannot be written here")
    return names[dtype]
