"""The stream's frames: a head of fixed size with a checksum, and a payload of bounded length.

```
stream   magic, 8 bytes | manifest frame | chunk frames, file after file | end frame
frame    kind u8 | codec u8 | stride u8 | 0 u8 | raw bytes u32 | payload bytes u32 | CRC-32 u32 | payload
```

Numbers are little-endian. The CRC-32 is of the 12 bytes before it and the payload. Whatever a stream claims, a reader
needs memory for one frame, which ``MAX_CHUNK`` and ``MAX_MANIFEST`` bound.
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

MAGIC = b"HQQPACK\x01"
"""The last byte is the version of the format."""
MAX_CHUNK = 4 << 20
"""Bytes of a chunk, before it is compressed and after."""
MAX_MANIFEST = 1 << 20
MAX_FILES = 4096

MANIFEST, CHUNK, END = 1, 2, 3
_HEAD = struct.Struct("<BBBBII")
_CRC = struct.Struct("<I")


class TransferError(ValueError):
    """A stream that is cut short, altered, or does not hold what it claims."""


@dataclass(frozen=True)
class Frame:
    """kind: MANIFEST, CHUNK or END. codec, stride: how a chunk's ``payload`` became of its ``raw_size`` bytes."""

    kind: int
    codec: int
    stride: int
    raw_size: int
    payload: bytes


@dataclass(frozen=True)
class FileEntry:
    """name: a plain file name. size: bytes."""

    name: str
    size: int


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a stream does, of whichever version."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC) - 1) == MAGIC[:-1]
    except OSError:
        return False


def write_frame(stream: BinaryIO, frame: Frame) -> int:
    """Write a frame; its bytes."""
    head = _HEAD.pack(frame.kind, frame.codec, frame.stride, 0, frame.raw_size, len(frame.payload))
    crc = zlib.crc32(frame.payload, zlib.crc32(head))
    stream.write(head + _CRC.pack(crc))
    stream.write(frame.payload)
    return len(head) + _CRC.size + len(frame.payload)


def read_frame(stream: BinaryIO, what: str) -> Frame:
    """The next frame; ``what``: what should come now, in words. TransferError where it is cut, altered or too long."""
    head = read_exactly(stream, _HEAD.size, what)
    kind, codec, stride, zero, raw_size, size = _HEAD.unpack(head)
    (crc,) = _CRC.unpack(read_exactly(stream, _CRC.size, what))
    limit = MAX_MANIFEST if kind == MANIFEST else MAX_CHUNK
    if kind not in (MANIFEST, CHUNK, END) or zero or not raw_size <= limit or not size <= limit:
        raise TransferError(f"the stream is damaged: no frame begins where {what} should come")
    payload = read_exactly(stream, size, what)
    if zlib.crc32(payload, zlib.crc32(head)) != crc:
        raise TransferError(f"the stream is damaged: the checksum of {what} is wrong")
    return Frame(kind, codec, stride, raw_size, payload)


def read_exactly(stream: BinaryIO, size: int, what: str) -> bytes:
    """``size`` bytes, however few at a time the stream gives; TransferError where it ends before."""
    parts = []
    missing = size
    while missing:
        part = stream.read(missing)
        if not part:
            raise TransferError(f"the stream ends in the middle of {what}: it was cut short")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def manifest(files: list[FileEntry]) -> bytes:
    """The payload of the manifest frame."""
    return json.dumps({"files": [{"name": f.name, "size": f.size} for f in files]}).encode()


def parse_manifest(payload: bytes) -> list[FileEntry]:
    """The files that the stream will bring; TransferError where a name or size is not allowed.

    Names are plain file names: a stream cannot write outside of the directory that it is unpacked to.
    """
    try:
        entries: Any = json.loads(payload)["files"]
        files = [FileEntry(entry["name"], entry["size"]) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TransferError("the stream's list of files is no list of names and sizes") from None
    if not 0 < len(files) <= MAX_FILES:
        raise TransferError(f"the stream has {len(files)} files; allowed are 1 to {MAX_FILES}")
    seen: set[str] = set()
    for file in files:
        check_name(file.name)
        folded = file.name.casefold()  # some file systems make no difference
        if folded in seen:
            raise TransferError(f"the stream has two files named {file.name!r}")
        seen.add(folded)
        if type(file.size) is not int or not 0 <= file.size < 1 << 62:
            raise TransferError(f"{file.name!r} has {file.size!r} bytes, which is no size of a file")
    return files


def check_name(name: Any) -> None:
    """TransferError for what is no plain file name: paths, "..", names of devices, control characters."""
    good = isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) <= 255 and name.isprintable()
    if not good or name in (".", "..") or any(character in name for character in '/\\:*?"<>|'):
        raise TransferError(f"the stream names a file {str(name)[:80]!r}; only plain file names are allowed")
