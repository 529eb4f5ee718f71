"""The files of a checkpoint: one safetensors file, or shards with an index."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hqqtensor.serialization.layout import CheckpointError, InputError, read_json
from hqqtensor.serialization.mapped import MappedFile
from hqqtensor.serialization.private_copy import place_to_map

DEFAULT_NAME = "model.safetensors"


def index_path(path: Path) -> Path:
    """The index file that belongs to ``path`` when it is sharded."""
    return path.with_name(path.name + ".index.json")


def checkpoint_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint given as file, index or directory; CheckpointError where there is none.

    In a directory: ``model.safetensors``, whole or sharded, else the only safetensors file there, whatever its name.
    """
    with readable(path):
        return files_there(Path(path))


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Make an error of the file system (a name that is too long, a directory that is shut) a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from None


def files_there(path: Path) -> list[Path]:
    """``checkpoint_files`` with the file system's own errors."""
    if path.is_dir():
        present = sorted(path.glob("*.safetensors"))
        path = path / DEFAULT_NAME
        if len(present) == 1 and not index_path(path).is_file() and "-of-" not in present[0].name:
            return present
    index = path if path.name.endswith(".index.json") else index_path(path)
    if index != path and path.is_file():
        return [path]
    if not index.is_file():
        raise InputError(f"no checkpoint at {path}: neither the file nor {index.name} is there")
    try:
        names = sorted(set(read_json(index.read_bytes(), f"{index}: the index")["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: is no index of a sharded checkpoint") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: shard names must be plain file names")
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index}: shard {file.name} is missing")
    return files


def open_file(path: Path, shown: Path | None = None) -> Any:
    """``safe_open`` with its errors turned into CheckpointError naming ``shown``, by default the file."""
    with readable_tensors(shown or path):
        return safe_open(str(path), framework="pt", device="cpu")


@contextlib.contextmanager
def readable_tensors(path: Path) -> Iterator[None]:
    """Make errors of mapping a safetensors file, and of what is in it, a CheckpointError that names it."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path}: tensors of dtype {error} cannot be read") from None
    except RuntimeError as error:  # torch's, which maps the file
        raise CheckpointError(f"{path}: cannot be mapped ({error})") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda key: True, mmap: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``wanted`` tensors of one file by key, and its metadata; memory-mapped, or without ``mmap`` read."""
    with readable(path), place_to_map(path, mmap) as place, open_file(place, path) as f, readable_tensors(path):
        file = MappedFile(place, f)
        return {key: file.tensor(key) for key in filter(wanted, f.keys())}, f.metadata() or {}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None, shown: Path) -> None:
    """Write one safetensors file; OSError names ``shown``, which ``path`` may stand in for until it is whole."""
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))  # of a full disk, say: safetensors has it in its text alone
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(shown)) from error
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(shown)) from error
