"""Small damages to bytes, JSON values and lists of fields, drawn from a random generator."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 5, 7, 8, 9, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 4096, 2**15, 2**16, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**40 + 1, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**70, -(2**31), -(2**63),
)  # fmt: skip
"""At the edges of integer types, and of what the readers allow."""

VALUES: tuple[Any, ...] = (
    None, True, False, "", [], {}, [[]], {"a": []}, 0.0, -0.0, 0.5, 1e308, -1e308, float("nan"), float("inf"), "1",
    "x" * 300, "\x00", "../x", "é\ud800", "__class__", [1, 2, 3], ["0.weight"], "0.weight",
)  # fmt: skip
"""Of every JSON type, and some texts that break careless code."""

WORDS = (
    "int", "nf4", "fp4", "fp6", "fp8", "codebook", "tensor", "row", "float", "int8", "float32", "float16", "bfloat16",
    "float64", "qdata", "scale", "zero_point", "act_pre_scale", "HQQTensor", "Tensor", "gptq", "gptq_v2", "awq", "gemm",
)  # fmt: skip
"""Names that the formats know: one in the place of another is well formed and wrong."""

DEEP = "[" * 100_000


def number(rng: random.Random, old: int = 0) -> int:
    """An integer from an edge, or near ``old``."""
    if rng.random() < 0.5:
        return rng.choice(NUMBERS)
    return rng.choice([old + 1, old - 1, old * 2, old // 2, -old, old + 8, old ^ 1 << rng.randrange(8)])


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """``data`` after one to four damages."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _damage(rng, out)
    return bytes(out)


def _damage(rng: random.Random, out: bytearray) -> None:
    if not out:
        out += rng.randbytes(rng.randrange(64))
        return
    # Headers are at the front, and what they say decides how the rest is read.
    limit = rng.choice([16, 64, 512, len(out), len(out)])
    at = rng.randrange(min(limit, len(out)))
    size = min(rng.choice([1, 2, 4, 8, 16, 64]), len(out) - at)
    other = rng.randrange(len(out))

    def overwrite() -> None:
        code, width = rng.choice([("<H", 2), ("<I", 4), ("<Q", 8)])
        place = at - at % rng.choice([1, 4, 8])
        out[place : place + width] = struct.pack(code, number(rng) % (1 << 8 * width))

    def swap() -> None:
        first, second = bytes(out[at : at + size]), bytes(out[other : other + size])
        if len(first) == len(second):
            out[at : at + size], out[other : other + size] = second, first

    changes: list[Callable[[], Any]] = [
        lambda: out.__setitem__(at, out[at] ^ 1 << rng.randrange(8)),
        lambda: out.__setitem__(at, rng.randrange(256)),
        lambda: out.__setitem__(slice(at, at + size), rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size),
        lambda: out.__setitem__(slice(at, at + size), rng.randbytes(size)),
        lambda: out.__delitem__(slice(at, len(out))),
        lambda: out.__delitem__(slice(at, at + size)),
        lambda: out.__setitem__(slice(at, at), out[other : other + size]),
        lambda: out.extend(rng.randbytes(size)),
        overwrite, overwrite, overwrite, swap,
    ]  # fmt: skip
    rng.choice(changes)()


def damage_json(rng: random.Random, value: Any) -> Any:
    """``value`` with one node replaced, removed, doubled, wrapped or swapped with another; ``value`` stays as it is."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            places.append((node, key))
            walk(child)

    walk(value)
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    old = parent[key]
    choice = rng.randrange(10)
    if choice == 0:
        del parent[key]
    elif choice == 1:
        parent[key] = rng.choice([[old], {"a": old}, str(old)])
    elif choice == 2:
        other, place = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[place]))
    elif choice == 3 and isinstance(parent, dict):
        parent[rng.choice([*WORDS, "", "x", f"{key} ", *parent])] = old
    elif choice == 3:
        parent.insert(key, old)
    elif choice in (4, 5, 6) and isinstance(old, int) and not isinstance(old, bool):
        parent[key] = rng.choice([number(rng, old), number(rng, old), float(old), str(old)])
    elif choice in (4, 5, 6) and isinstance(old, str):
        parent[key] = rng.choice([*WORDS, old[:-1], old + old, old.upper()])
    elif choice in (4, 5, 6) and isinstance(old, list) and old:
        parent[key] = rng.choice([old[::-1], old[:-1], old + old, old * 1000, [old[0]] * len(old)])
    else:
        parent[key] = rng.choice([*VALUES, number(rng), rng.choice(WORDS)])
    return value


def json_text(rng: random.Random, value: Any) -> str:
    """JSON text of ``value`` after some damages; now and then damaged as text, or nested without end."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = damage_json(rng, value)
    text = json.dumps(value)
    choice = rng.random()
    if choice < 0.03:
        at = rng.randrange(len(text))
        return text[:at] + DEEP + text[at:]
    if choice < 0.1:
        return damage_bytes(rng, text.encode()).decode("utf-8", "replace")
    return text


def damage_fields(rng: random.Random, fields: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Fields ``(code of struct, number)`` or ``("bytes", bytes)``, one to three of them changed, lost or doubled."""
    out = list(fields)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not out:
            return out
        at = rng.randrange(len(out))
        code, value = out[at]
        choice = rng.randrange(12)
        if choice == 0:
            del out[at]
        elif choice == 1:
            out.insert(at, out[rng.randrange(len(out))])
        elif choice == 2:
            other = rng.randrange(len(out))
            out[at], out[other] = out[other], out[at]
        elif code == "bytes":
            out[at] = (code, damage_bytes(rng, value))
        elif code in "fd":
            out[at] = (code, rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-40]))
        else:
            out[at] = (code, number(rng, value))
    return out


def join_fields(fields: Sequence[tuple[str, Any]]) -> bytes:
    """The fields as little-endian bytes, numbers cut to their width."""
    parts = []
    for code, value in fields:
        if code == "bytes":
            parts.append(value)
        elif code in "fd":
            parts.append(struct.pack(f"<{code}", value))
        else:
            width = struct.calcsize(f"<{code}")
            parts.append((int(value) % (1 << 8 * width)).to_bytes(width, "little"))
    return b"".join(parts)
