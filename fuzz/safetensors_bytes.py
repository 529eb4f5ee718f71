"""A safetensors file as a list of tensors, so that a damaged one can still be well formed."""

import json
import math
import random
import struct
from dataclasses import dataclass, replace
from typing import Any

from fuzz.mutate import DEEP, damage_bytes, damage_json, json_text, number

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2,
    "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
PATTERNS = (b"\0", b"\xff", b"\x00\x7c", b"\x00\x7e", b"\x00\x00\x80\x7f", b"\x00\x80", b"\x01\x00", b"\x7f")
"""Zeros, ones, infinities and NaN of float16 and float32, the lowest int16, a subnormal."""


@dataclass(frozen=True)
class Stored:
    """One tensor: name, dtype and shape as the header says them, and its bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


def parse(raw: bytes) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a whole file and its metadata."""
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = header.pop("__metadata__", {})
    return [Stored(n, i["dtype"], i["shape"], data[slice(*i["data_offsets"])]) for n, i in header.items()], metadata


def compose(tensors: list[Stored], metadata: dict[str, str]) -> bytes:
    """The file of these tensors; where two have one name, the header has the later."""
    header, data = header_of(tensors, metadata)
    return with_header(header, data)


def header_of(tensors: list[Stored], metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes after it."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts: list[bytes] = []
    at = 0
    for t in {t.name: t for t in tensors}.values():
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        parts.append(t.data)
        at += len(t.data)
    return header, b"".join(parts)


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damage(rng: random.Random, raw: bytes) -> bytes:
    """A damaged copy of a whole file: its bytes, its header, one tensor, or the JSON texts in its metadata."""
    tensors, metadata = parse(raw)
    choice = rng.random()
    if choice < 0.1:
        return damage_bytes(rng, raw)
    if choice < 0.2:
        header, data = header_of(tensors, metadata)
        return with_header(json_text(rng, header).encode("utf-8", "replace"), data)
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.5 and metadata:
            metadata = _damage_metadata(rng, metadata)
        elif tensors:
            tensors = damage_tensors(rng, tensors)
    return compose(tensors, metadata)


def _damage_metadata(rng: random.Random, metadata: dict[str, str]) -> dict[str, str]:
    key = rng.choice(list(metadata))
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):  # damaged before
        value = metadata[key]
    choice = rng.random()
    if choice < 0.1:
        return {name: text for name, text in metadata.items() if name != key}
    if choice < 0.15:
        return {**metadata, key: metadata[rng.choice(list(metadata))]}
    if choice < 0.18:
        return {**metadata, key: f'"HQQTensor"{DEEP}'}
    if isinstance(value, dict) and isinstance(value.get("_data"), dict) and choice < 0.7:
        # The attributes are what geometry is made of: damage them more often than the frame around them.
        return {**metadata, key: json.dumps({**value, "_data": damage_json(rng, value["_data"])})}
    return {**metadata, key: json_text(rng, value)}


def damage_tensors(rng: random.Random, tensors: list[Stored]) -> list[Stored]:
    """The tensors with one changed in a way that leaves the file well formed."""
    out = list(tensors)
    at = rng.randrange(len(out))
    t = out[at]
    choice = rng.randrange(10)
    if choice == 0:
        del out[at]
    elif choice == 1:
        out.append(
            replace(t, name=rng.choice([t.name + "_", "x", t.name.replace("qdata", "scale"), "model." + t.name]))
        )
    elif choice == 2:
        other = rng.randrange(len(out))
        out[at], out[other] = replace(t, name=out[other].name), replace(out[other], name=t.name)
    elif choice == 3:
        out[at] = _filled(replace(t, dtype=rng.choice(list(SIZES))), rng)
    elif choice in (4, 5) and t.shape:
        shape = list(t.shape)
        place = rng.randrange(len(shape))
        shape[place] = rng.choice([0, 1, shape[place] + 1, max(0, shape[place] - 1), shape[place] * 2, 4096])
        out[at] = _filled(replace(t, shape=shape), rng)
    elif choice == 6:
        shape = rng.choice([t.shape[::-1], [1, *t.shape], [*t.shape, 1], t.shape[1:], [math.prod(t.shape)], []])
        out[at] = _filled(replace(t, shape=list(shape)), rng)
    elif choice == 7:
        out[at] = replace(t, data=(rng.choice(PATTERNS) * len(t.data))[: len(t.data)])
    elif choice == 8 and t.dtype.startswith("I"):
        width = SIZES[t.dtype]
        place = rng.randrange(max(1, len(t.data) // width)) * width
        value = (number(rng) % (1 << 8 * width)).to_bytes(width, "little")
        out[at] = replace(t, data=(t.data[:place] + value + t.data[place + width :])[: len(t.data)])
    else:
        data = bytearray(t.data)
        for _ in range(rng.choice([1, 1, 8]) if data else 0):
            data[rng.randrange(len(data))] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        out[at] = replace(t, data=bytes(data))
    return out


def _filled(t: Stored, rng: random.Random) -> Stored:
    """The tensor with as many bytes as its shape and dtype ask for, within a bound."""
    size = math.prod(t.shape) * SIZES.get(t.dtype, 1)
    if size > 1 << 22:
        return replace(t, shape=[0])
    seed = t.data or rng.choice(PATTERNS)
    return replace(t, data=(seed * (size // len(seed) + 1))[:size])
