"""Compressed streams of a directory (``hqqtensor pack``), damaged with and without their checksums made right again."""

import hashlib
import io
import json
import random
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

from fuzz.mutate import damage_bytes, json_text, number
from fuzz.target import ROOT, Files, Target, Wrong
from hqqtensor.transfer import pack_directory, unpack_stream
from hqqtensor.transfer.frames import CHUNK, END, MAGIC, MANIFEST, TransferError

SOURCE = ROOT / "tests" / "assets" / "checkpoints" / "v1" / "sharded_bfloat16"
_HEAD = struct.Struct("<BBBBII")
Frame = tuple[list[int], bytes]
"""Kind, codec, stride, zero, raw size, payload size; payload."""


@cache
def _source() -> Files:
    return {file.name: file.read_bytes() for file in SOURCE.iterdir()}


@cache
def _seeds() -> list[bytes]:
    streams = []
    with tempfile.TemporaryDirectory() as folder:
        for name, data in _source().items():
            Path(folder, name).write_bytes(data)
        for compression in ("none", "deflate", "zstd"):
            out = io.BytesIO()
            pack_directory(folder, out, compression)
            streams.append(out.getvalue())
    return streams


def _frames(stream: bytes) -> list[Frame]:
    frames, at = [], len(MAGIC)
    while at < len(stream):
        head = list(_HEAD.unpack_from(stream, at))
        at += _HEAD.size + 4
        frames.append((head, stream[at : at + head[5]]))
        at += head[5]
    return frames


def _case(rng: random.Random) -> Files:
    stream = rng.choice(_seeds())
    if rng.random() < 0.3:
        return {"stream": damage_bytes(rng, stream)}
    frames = _frames(stream)
    for _ in range(rng.choice([1, 1, 2])):
        _damage(rng, frames)
    if rng.random() < 0.7:
        _sign(frames)
    out = [MAGIC]
    for head, payload in frames:
        packed = _HEAD.pack(*(v % 256 for v in head[:4]), *(v % 2**32 for v in head[4:]))
        out += [packed, struct.pack("<I", zlib.crc32(payload, zlib.crc32(packed))), payload]
    return {"stream": b"".join(out), "forged": b""}


@cache
def _bomb() -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return squeeze.compress(b"\0" * (1 << 24)) + squeeze.flush()


def _damage(rng: random.Random, frames: list[Frame]) -> None:
    if not frames:
        return
    at = rng.randrange(len(frames))
    head, payload = list(frames[at][0]), frames[at][1]
    choice = rng.randrange(8)
    if choice == 0:
        del frames[at]
        return
    if choice == 1:
        frames.insert(rng.randrange(len(frames)), frames[at])
        return
    if choice in (2, 3):
        place = rng.randrange(6)
        head[place] = number(rng, head[place])
    elif choice == 4 or head[0] == MANIFEST:
        if head[0] == MANIFEST:
            payload = json_text(rng, json.loads(payload or b"{}")).encode("utf-8", "replace")
        else:
            payload = damage_bytes(rng, payload)
        head[5] = len(payload)
    elif choice == 5:  # a bomb: far more bytes than it says
        payload = _bomb()
        head = [CHUNK, 1, 1, 0, head[4], len(payload)]
    else:
        payload = damage_bytes(rng, payload)
        head[5] = len(payload)
    frames[at] = (head, payload)


def _sign(frames: list[Frame]) -> None:
    """Make the digest at the end that of chunks that are stored as they are."""
    digest = hashlib.sha256()
    for place, (head, payload) in enumerate(frames):
        if head[0] == END:
            frames[place] = (head, digest.digest())
        elif head[0] == MANIFEST or head[1] == 0:
            digest.update(payload)


def run(files: Files, folder: Path) -> None:
    out = folder / "out"
    try:
        entries = unpack_stream(io.BytesIO(files["stream"]), out)
    except BaseException:
        if out.exists():
            raise Wrong("an error left something behind") from None
        raise
    read = {file.name: file.read_bytes() for file in out.iterdir()}
    if {entry.name: entry.size for entry in entries} != {name: len(data) for name, data in read.items()}:
        raise Wrong("the files are not those that the list names")
    if "forged" not in files and read != _source():
        raise Wrong("the checksums did not notice a change")


TARGETS = (Target("stream", _case, run, (TransferError,)),)
