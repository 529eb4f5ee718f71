"""What a GGUF file's metadata costs: arrays and long texts are stepped over, not read."""

import struct
import tracemalloc
from pathlib import Path

import pytest

from hqqtensor.serialization.gguf_file import Unread, open_gguf
from hqqtensor.serialization.gguf_llama import llama_config
from hqqtensor.serialization.layout import CheckpointError

UINT8, UINT32, STRING, ARRAY, INT64 = 0, 4, 8, 9, 11


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count)


def write(path: Path, entries: list[tuple[str, bytes]], zeros: int = 0) -> Path:
    """Metadata of (key, type and value), the last value followed by zeros, which take no room on the disk."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(text(key) + value for key, value in entries)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + zeros)
    return path


@pytest.mark.parametrize(
    ("value", "count", "zeros"),
    [
        (array(UINT8, 10**8), 10**8, 10**8),
        (array(INT64, 10**7), 10**7, 8 * 10**7),
        (array(STRING, 5 * 10**5), 5 * 10**5, 8 * 5 * 10**5),
        (struct.pack("<IQ", STRING, 10**8), 10**8, 10**8),
        (
            array(ARRAY, 2) + struct.pack("<IQ", UINT8, 10**6) + bytes(10**6) + struct.pack("<IQ", UINT8, 3),
            2,
            3,
        ),
    ],
    ids=["bytes", "numbers", "texts", "long text", "arrays"],
)
def test_arrays_and_long_texts_take_no_memory(tmp_path: Path, value: bytes, count: int, zeros: int) -> None:
    file = write(tmp_path / "a.gguf", [("after", struct.pack("<II", UINT32, 7)), ("k", value)], zeros)
    del value
    tracemalloc.start()
    try:
        metadata = open_gguf(file).metadata
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert metadata == {"after": 7, "k": Unread(count)}
    assert peak < 2**20


def test_what_follows_an_array_is_read(tmp_path: Path) -> None:
    words = b"".join(text(word) for word in ("a", "", "long" * 1000))
    entries = [
        ("numbers", array(INT64, 3) + struct.pack("<3q", 1, 2, 3)), ("words", array(STRING, 3) + words),
        ("nested", array(ARRAY, 1) + struct.pack("<IQ", STRING, 3) + words),
        ("name", struct.pack("<I", STRING) + text("x")),
    ]  # fmt: skip
    want = {"numbers": Unread(3), "words": Unread(3), "nested": Unread(1), "name": "x"}
    assert open_gguf(write(tmp_path / "a.gguf", entries)).metadata == want


@pytest.mark.parametrize(
    ("value", "zeros", "match"),
    [
        (array(STRING, 3) + text("abc"), 8, "cut short"),
        (array(STRING, 2) + struct.pack("<Q", 2**64 - 1), 64, "cut short"),
        (array(STRING, 2**40), 8, "array claims 1099511627776 entries"),
        (array(ARRAY, 10**5), 12 * 10**5, "over 65536 arrays"),
        (array(STRING, 2**22 + 1), 2**26, "has 4194305 texts in arrays, over 4194304"),
        (struct.pack("<IQ", STRING, 2**63), 8, "cut short"),
    ],
    ids=["last text", "huge text", "huge count", "many arrays", "many texts", "long text"],
)
def test_lengths_that_run_over_the_end_are_refused(tmp_path: Path, value: bytes, zeros: int, match: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{match}"):
        open_gguf(write(tmp_path / "a.gguf", [("k", value)], zeros))


def test_names_have_a_bound(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a name has 100000 bytes"):
        open_gguf(write(tmp_path / "a.gguf", [("k" * 100000, struct.pack("<II", UINT32, 7))]))


def test_an_array_where_one_number_is_needed_is_named(tmp_path: Path) -> None:
    entries = [
        ("general.architecture", struct.pack("<I", STRING) + text("llama")),
        ("llama.attention.head_count", array(UINT32, 2) + struct.pack("<2I", 4, 4)),
    ]
    with pytest.raises(CheckpointError, match=r"head_count must be a positive whole number, got Unread\(count=2\)"):
        llama_config(open_gguf(write(tmp_path / "a.gguf", entries)))
