"""unpack_stream: the files of a stream into a directory, checked before anything is believed."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hqqtensor.transfer.codecs import decompress
from hqqtensor.transfer.frames import (
    CHUNK,
    END,
    MAGIC,
    MANIFEST,
    FileEntry,
    TransferError,
    parse_manifest,
    read_exactly,
    read_frame,
)


def unpack_stream(
    stream: BinaryIO, directory: str | os.PathLike[str], progress: Callable[[int, int, str], None] | None = None
) -> list[FileEntry]:
    """Write the files of ``pack_directory``'s stream into an empty or new directory; the files.

    Reads no byte beyond the stream's end, so that a socket can go on with something else. ``progress`` as there. On an
    error what was written is removed again.

    TransferError (a ValueError) for a stream that is no such stream, is cut short or altered, names files that are no
    plain names, or claims more bytes than the disk has free (before anything is written); ValueError where the
    directory is not empty, ImportError where the package of its compression is missing, OSError as the disk raises it.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; a stream is unpacked into an empty or new directory")
    if read_exactly(stream, len(MAGIC) - 1, "the first bytes") != MAGIC[:-1]:
        raise TransferError("this is no stream of hqqtensor pack: the first bytes are others")
    version = read_exactly(stream, 1, "the first bytes")
    if version != MAGIC[-1:]:
        raise TransferError(f"the stream has format version {version[0]}; this hqqtensor reads {MAGIC[-1]}")
    head = read_frame(stream, "the list of files")
    if head.kind != MANIFEST:
        raise TransferError("the stream is damaged: it does not begin with a list of files")
    files = parse_manifest(head.payload)
    was_there = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(head.payload)
    total, free = sum(file.size for file in files), shutil.disk_usage(directory).free
    written: list[Path] = []
    try:
        if total > free:
            raise TransferError(f"the stream holds {total} bytes; the disk of {directory} has {free} free")
        done = 0
        for file in files:
            written.append(directory / file.name)
            done = _read_file(stream, file, written[-1], digest, (done, total), progress)
        end = read_frame(stream, "the checksum at the end")
        if end.kind != END or end.payload != digest.digest():
            raise TransferError("the stream is damaged: the checksum of all files is wrong")
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if not was_there:
            directory.rmdir()
        raise
    return files


def _read_file(
    stream: BinaryIO, file: FileEntry, path: Path, digest: "hashlib._Hash", bounds: tuple[int, int],
    progress: Callable[[int, int, str], None] | None,
) -> int:  # fmt: skip
    """Write one file; how many bytes of all files are done then."""
    done, total = bounds
    left = file.size
    with open(path, "xb") as out:
        while left:
            frame = read_frame(stream, repr(file.name))
            if frame.kind != CHUNK or not 0 < frame.raw_size <= left:
                raise TransferError(f"the stream is damaged: {file.name!r} does not have the bytes that it is to have")
            raw = decompress(frame)
            digest.update(raw)
            out.write(raw)
            left -= len(raw)
            done += len(raw)
            if progress is not None:
                progress(done, total, file.name)
    return done
