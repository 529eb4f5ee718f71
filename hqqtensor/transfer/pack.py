"""pack_directory: the files of a directory into a stream, tensor by tensor."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hqqtensor.transfer.codecs import STORED, check_compression, compress
from hqqtensor.transfer.frames import (
    CHUNK,
    END,
    MAGIC,
    MANIFEST,
    MAX_CHUNK,
    FileEntry,
    Frame,
    TransferError,
    check_name,
    manifest,
    write_frame,
)
from hqqtensor.whole_file import naming, reading

_STRIDES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4}
"""Bytes of a number by its type in safetensors; those of packed codes have none that would help."""
SMALLEST = 1 << 14
"""Bytes of a tensor that gets chunks of its own; smaller ones share one with their neighbours."""


@dataclass(frozen=True)
class PackSummary:
    """files: names in the order of the stream. raw_bytes: of all files. packed_bytes: of the stream. skipped: names of
    what is no file, such as folders, and is not in the stream."""

    files: list[str]
    raw_bytes: int
    packed_bytes: int
    skipped: list[str]


def pack_directory(
    directory: str | os.PathLike[str],
    stream: BinaryIO,
    compression: str = "zstd",
    progress: Callable[[int, int, str], None] | None = None,
) -> PackSummary:
    """Write all files of a directory to ``stream``: a file, a pipe, or what ``socket.makefile("wb")`` gives.

    compression: "zstd", "deflate" (Python's own) or "none"; chunks that do not shrink are stored as they are.
    ``progress(done, total, name)``: bytes of the files, after each chunk. Folders within the directory are left out.
    Nothing is ever sought in the stream, so that a pipe will do.

    ValueError for another compression, TransferError (a ValueError) for a directory without files or a file that
    changes meanwhile, ImportError where the compression's package is missing, OSError as the files and stream raise it.
    """
    check_compression(compression)
    squeeze = compress(compression)
    paths = sorted(Path(directory).iterdir())
    files = [FileEntry(path.name, path.stat().st_size) for path in paths if path.is_file()]
    if not files:
        raise TransferError(f"{directory} has no files to pack")
    for file in files:
        check_name(file.name)
    payload = manifest(files)
    digest = hashlib.sha256(payload)
    stream.write(MAGIC)
    packed = len(MAGIC) + write_frame(stream, Frame(MANIFEST, STORED, 1, len(payload), payload))
    done, total = 0, sum(file.size for file in files)
    for file in files:
        sent = 0
        for raw, stride in _chunks(Path(directory, file.name), file.size):
            digest.update(raw)
            codec, body = squeeze(raw, stride)
            packed += write_frame(stream, Frame(CHUNK, codec, stride, len(raw), body))
            sent += len(raw)
            done += len(raw)
            if progress is not None:
                progress(done, total, file.name)
        if sent != file.size:
            raise TransferError(f"{file.name} had {file.size} bytes and now has {sent}: it changed while it was packed")
    packed += write_frame(stream, Frame(END, STORED, 1, digest.digest_size, digest.digest()))
    stream.flush()
    return PackSummary([file.name for file in files], total, packed, [p.name for p in paths if not p.is_file()])


def _chunks(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """The bytes of a file in pieces of one kind each, with the bytes of a number in it."""
    with naming(path), reading(path) as file:
        for length, stride in _regions(file, path, size):
            left = length
            while left:
                raw = file.read(min(left, MAX_CHUNK))
                if not raw:
                    return
                left -= len(raw)
                yield raw, stride if len(raw) % stride == 0 else 1


def _regions(file: BinaryIO, path: Path, size: int) -> list[tuple[int, int]]:
    """(bytes, bytes of a number) of the parts of a file: a safetensors file's tensors, or the whole of another."""
    try:
        tensors = _tensors(file, size) if path.suffix == ".safetensors" else []
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error):
        tensors = []  # what it is is not for us to say: it goes over as it is
    file.seek(0)
    regions: list[tuple[int, int]] = []
    place = 0
    for begin, end, stride in tensors:
        if begin != place:
            regions.append((begin - place, 1))
        # Small tensors of a kind are compressed together.
        last = regions[-1] if regions else (0, 0)
        if begin == place and last[1] == stride and (end - begin < SMALLEST or last[0] < SMALLEST):
            regions[-1] = (last[0] + end - begin, stride)
        else:
            regions.append((end - begin, stride))
        place = end
    return [*regions, (size - place, 1)] if size > place else regions


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int, int]]:
    """(begin, end, bytes of a number) of a safetensors file's tensors, in order; ValueError where it is none."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise ValueError("no header")
    entries: dict[str, Any] = json.loads(file.read(length))
    begin = 8 + length
    tensors = sorted(
        (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1], _STRIDES.get(entry["dtype"], 1))
        for name, entry in entries.items()
        if name != "__metadata__"
    )
    place = begin
    for first, last, _ in tensors:
        if not place <= first <= last <= size:
            raise ValueError("tensors overlap")
        place = last
    return tensors
