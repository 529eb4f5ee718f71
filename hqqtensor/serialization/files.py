"""The files of a checkpoint: one safetensors file, or shards with an index."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hqqtensor.serialization.layout import CheckpointError, InputError

DEFAULT_NAME = "model.safetensors"


def index_path(path: Path) -> Path:
    """The index file that belongs to ``path`` when it is sharded."""
    return path.with_name(path.name + ".index.json")


def checkpoint_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint given as file, index or directory; CheckpointError where there is none.

    In a directory: ``model.safetensors``, whole or sharded, else the only safetensors file there, whatever its name.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        path = path / DEFAULT_NAME
        if len(found) == 1 and not index_path(path).is_file() and "-of-" not in found[0].name:
            return found
    index = path if path.name.endswith(".index.json") else index_path(path)
    if index != path and path.is_file():
        return [path]
    if not index.is_file():
        raise InputError(f"no checkpoint at {path}: neither the file nor {index.name} is there")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: is no index of a sharded checkpoint") from None
    if any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise CheckpointError(f"{index}: shard names must be plain file names")
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index}: shard {file.name} is missing")
    return files


def open_file(path: Path) -> Any:
    """``safe_open`` with its errors turned into CheckpointError naming the file."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
