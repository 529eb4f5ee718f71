"""Puts the files of a save where a checkpoint may be already: whatever stops it, the old one or the new one is whole.

A checkpoint in one file is replaced in one step. Shards cannot be, so that new shards never take the names of those
that are in use: they are all in place before one step (the index, or the removal of a ``model.safetensors``, which
comes before an index) makes them the checkpoint, and only then are the old ones removed.

Shards have the names that other tools expect, ``model-00001-of-00003.safetensors``, wherever these are free: in a new
directory, and in one whose checkpoint has another number of shards. Else something that differs from save to save comes
before the number, as in ``model-5f2a91c0-00001-of-00003.safetensors``. (Names of their own for every save would need no
such choice, but there are tools that go by the usual names; the usual names alone would let an interrupted save destroy
both checkpoints.)

Two savers at once take turns by a lock on the directory. Where the file system has no locks, and for transformers'
``save_pretrained``, which overwrites shards by name, an identity in each shard tells that two saves are mixed
(``header.read_header``).
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hqqtensor.serialization.files import files_there, index_path, open_file
from hqqtensor.serialization.header import is_of_a_save
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.whole_file import close_unchanged, sync_to_disk

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def publish(
    path: Path, written: Sequence[Path], keys: Sequence[Sequence[str]], nbytes: int,
    sync: Callable[[Path], None] = sync_to_disk,
) -> None:  # fmt: skip
    """Move the files of one save to ``path``, or beside it with an index where they are several.

    written: whole files on the same file system, in the order of the shards. keys: names of the tensors in each.
    nbytes: of all tensors. sync: puts a file, or the names in a folder, on disk. What a loss of power leaves is whole,
    too: files are on disk before they are named, new names before old files go.
    """
    for file in written:
        sync(file)
    with _locked(path.parent):
        in_use = _in_use(path)
        names = _free_names(path, len(written), in_use)
        if len(names) == 1:
            os.replace(written[0], path)
            index_path(path).unlink(missing_ok=True)
        else:
            _move_shards(path, written, names, index_text(names, keys, nbytes), sync)
        try:
            sync(path.parent)
        finally:
            for name in (in_use - set(names)) | _orphans(path, in_use | set(names)):
                (path.parent / name).unlink(missing_ok=True)


def shard_names(stem: str, count: int) -> list[str]:
    """The usual names of ``count`` files; of a single one ``stem.safetensors``."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{place + 1:05}-of-{count:05}.safetensors" for place in range(count)]


def index_text(names: Sequence[str], keys: Sequence[Sequence[str]], nbytes: int) -> str:
    """The index file of shards; ``keys``: names of the tensors in each, ``nbytes``: of all tensors."""
    weight_map = {key: name for name, some in zip(names, keys, strict=True) for key in some}
    return json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=1)


def _move_shards(
    path: Path, written: Sequence[Path], names: Sequence[str], index: str, sync: Callable[[Path], None]
) -> None:
    target, new_index = index_path(path), written[0].with_name("index.json")
    new_index.write_text(index)
    sync(new_index)
    try:
        for file, name in zip(written, names, strict=True):
            os.replace(file, path.parent / name)
        sync(path.parent)
        os.replace(new_index, target)
        path.unlink(missing_ok=True)
    except BaseException:
        # An interrupt can come right after the index was replaced: then the shards are the checkpoint.
        if not target.is_file() or target.read_text() != index:
            for name in names:
                (path.parent / name).unlink(missing_ok=True)
        raise


def _orphans(path: Path, others: set[str]) -> set[str]:
    """Shards but ``others`` of saves of ``path`` that were killed before or after they became the checkpoint."""
    pattern = re.compile(re.escape(path.stem) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
    names = {file.name for file in path.parent.iterdir() if pattern.fullmatch(file.name)}
    return {name for name in names - others if _is_ours(path.with_name(name))}


def _is_ours(file: Path) -> bool:
    try:
        with open_file(file) as opened:
            return is_of_a_save(opened.metadata() or {})
    except CheckpointError:
        return False


def _free_names(path: Path, count: int, in_use: set[str]) -> list[str]:
    if count == 1:
        return [path.name]
    for stem in (path.stem, f"{path.stem}-{secrets.token_hex(4)}"):
        names = shard_names(stem, count)
        if not in_use & set(names):
            break
    return names


def _in_use(path: Path) -> set[str]:
    """Names of the files that the checkpoint at ``path`` is read from, if there is one.

    OSError where that cannot be read: its shards would be overwritten before the new ones are in place.
    """
    try:
        return {file.name for file in files_there(path)}
    except CheckpointError:
        return set()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other savers out, as far as the file system can."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        close_unchanged(handle)
