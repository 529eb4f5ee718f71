"""Small GGUF files of the kinds that overflowed, confused, stalled or starved other readers; each is refused at once.

GHSA-96jg-mvhq-q7q7: an alignment near 2**32 overflows what is added to it. llama.cpp#26690: a value that is read as a
number is an array, or the reverse. llama.cpp#27188: 43 bytes that keep a reader busy. ggml#1516: 160 bytes that ask
for gigabytes. The files were written here after these descriptions, in every place where a header has such a number.
"""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import llama_config
from hqqtensor.serialization.layout import CheckpointError

U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10
HUGE = (2**31 - 1, 2**32 - 1, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"output_norm.weight") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(entries: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None) -> bytes:
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, entry_count) + b"".join([*entries, *tensors])


def refuse(path: Path, content: bytes) -> str:
    """The message; the file is refused in half a second of processor time, with a megabyte at the most."""
    path.write_bytes(content)
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(CheckpointError) as error:
        llama_config(open_gguf(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begun < 0.5 and peak < 1 << 20
    return str(error.value)


@pytest.mark.parametrize("alignment", [0, 1, 7, 2**31, 2**32 - 1, 2**32 - 32, 2**32 - 8])
def test_an_alignment_that_overflows(alignment: int, tmp_path: Path) -> None:
    content = header([entry(b"general.alignment", U32, struct.pack("<I", alignment))], [tensor((8,))]) + bytes(64)
    assert "general.alignment" in refuse(tmp_path / "a.gguf", content)


@pytest.mark.parametrize("offset", [2**32, 2**63, 2**64 - 32, 2**64 - 128])
@pytest.mark.parametrize("extent", [8, 2**30])
def test_an_offset_that_overflows(offset: int, extent: int, tmp_path: Path) -> None:
    assert "lies at" in refuse(tmp_path / "a.gguf", header([], [tensor((extent,), offset=offset)]) + bytes(64))


@pytest.mark.parametrize("shape", [(2**32, 2**32), (2**63, 2), (2**40,) * 4, (2**62,), (0,), (0, 2**62)])
def test_extents_whose_product_overflows(shape: tuple[int, ...], tmp_path: Path) -> None:
    refuse(tmp_path / "a.gguf", header([], [tensor(shape)]) + bytes(64))


NUMBERS = ("attention.head_count", "attention.head_count_kv", "embedding_length", "block_count", "context_length")
KEYS = ("general.architecture", "general.alignment", "split.count", *(f"llama.{name}" for name in NUMBERS))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", [U8, U32, F32, STRING, U64])
def test_an_array_in_the_place_of_a_number_or_text(key: str, kind: int, tmp_path: Path) -> None:
    values = {key: entry(key.encode(), ARRAY, array(kind, 1, bytes(8)))}
    values.setdefault("general.architecture", entry(b"general.architecture", STRING, text(b"llama")))
    values.setdefault("llama.attention.head_count", entry(b"llama.attention.head_count", U32, struct.pack("<I", 2)))
    values.setdefault("llama.embedding_length", entry(b"llama.embedding_length", U32, struct.pack("<I", 8)))
    refuse(tmp_path / "a.gguf", header(list(values.values()), [tensor((8, 4), name=b"token_embd.weight")]) + bytes(256))


@pytest.mark.parametrize("kind", [U8, U32, F32, STRING, ARRAY, U64, 13, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", HUGE)
def test_an_array_of_more_entries_than_the_file_has(kind: int, count: int, tmp_path: Path) -> None:
    refuse(tmp_path / "a.gguf", header([entry(b"k", ARRAY, array(kind, count))], []))


def test_43_bytes_that_nest_or_loop_without_end(tmp_path: Path) -> None:
    for count in HUGE:
        for values in (b"", array(ARRAY, count), array(STRING, count)):
            content = header([entry(b"", ARRAY, array(ARRAY, 1, values))], [], (0, count))
            refuse(tmp_path / "a.gguf", content[:43].ljust(43, b"\0"))


@pytest.mark.parametrize("count", HUGE)
def test_160_bytes_that_ask_for_gigabytes(count: int, tmp_path: Path) -> None:
    claims = [
        header([], [], (count, 0)),
        header([], [], (0, count)),
        header([struct.pack("<Q", count)], []),  # the length of a key
        header([entry(b"k", STRING, struct.pack("<Q", count))], []),
        header([], [struct.pack("<Q", count)]),  # the length of a tensor's name
        header([], [tensor((count,))]),
        header([], [tensor((256, count), kind=14)]),
        header([], [text(b"a") + struct.pack("<I", count % 2**32)]),  # the number of dimensions
    ]
    for content in claims:
        refuse(tmp_path / "a.gguf", content.ljust(160, b"\0"))
