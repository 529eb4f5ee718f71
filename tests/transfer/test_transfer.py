"""A directory through a stream and back, bit for bit; streams that are cut, altered or hostile leave nothing behind."""

import io
import json
import os
import random
import socket
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hqqtensor import hqq_weight_only, load_model, quantize_, save_model
from hqqtensor.serialization.layout import InputError
from hqqtensor.transfer import TransferError, pack_directory, unpack_stream
from hqqtensor.transfer.codecs import DEFLATE, STORED, ZSTD
from hqqtensor.transfer.frames import CHUNK, END, MAGIC, MANIFEST, MAX_CHUNK, Frame, write_frame


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized model, scales as floats, beside other files."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    quantize_(model, hqq_weight_only(4, 32))
    save_model(model, path)
    (path / "config.json").write_text(json.dumps({"text": "the same words " * 500}))
    (path / "empty.txt").write_bytes(b"")
    (path / "noise.bin").write_bytes(random.Random(0).randbytes(70_000))
    (path / "folder").mkdir()
    return path


@pytest.fixture(scope="module")
def packed(model_dir: Path) -> bytes:
    stream = io.BytesIO()
    pack_directory(model_dir, stream, "deflate")
    return stream.getvalue()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def refused(data: bytes, out: Path, match: str) -> None:
    with pytest.raises(TransferError, match=match):
        unpack_stream(io.BytesIO(data), out)
    assert not out.exists()


def stream_of(*frames: Frame) -> bytes:
    stream = io.BytesIO()
    stream.write(MAGIC)
    for frame in frames:
        write_frame(stream, frame)
    return stream.getvalue()


def listing(*files: tuple[object, object]) -> Frame:
    payload = json.dumps({"files": [{"name": name, "size": size} for name, size in files]}).encode()
    return Frame(MANIFEST, STORED, 1, len(payload), payload)


@pytest.mark.parametrize("compression", ["zstd", "deflate", "none"])
def test_every_byte_comes_back(model_dir: Path, tmp_path: Path, compression: str) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    stream, calls = io.BytesIO(), []
    summary = pack_directory(model_dir, stream, compression, lambda *call: calls.append(call))
    assert summary.skipped == ["folder"] and summary.packed_bytes == len(stream.getvalue())
    assert summary.files == sorted(contents(model_dir)) and calls[-1][0] == calls[-1][1] == summary.raw_bytes
    assert compression == "none" or summary.packed_bytes < 0.97 * summary.raw_bytes
    stream.seek(0)
    files = unpack_stream(stream, tmp_path / "out")
    assert [file.name for file in files] == summary.files
    assert contents(tmp_path / "out") == contents(model_dir)


def test_through_a_socket_nothing_is_read_beyond_the_end(model_dir: Path, tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there, here.makefile("wb") as out:

        def send() -> None:
            pack_directory(model_dir, out, "deflate")
            out.write(b"more")
            out.flush()

        thread = threading.Thread(target=send)
        thread.start()
        with there.makefile("rb", buffering=0) as stream:
            unpack_stream(stream, tmp_path / "out")
            assert stream.read(4) == b"more"
        thread.join()
    assert contents(tmp_path / "out") == contents(model_dir)


def test_a_stream_that_is_cut_anywhere_is_refused(packed: bytes, tmp_path: Path) -> None:
    for end in [0, 3, 8, 10, 30, 200, len(packed) // 3, len(packed) // 2, len(packed) - 40, len(packed) - 1]:
        refused(packed[:end], tmp_path / "out", "cut short")


def test_a_stream_of_which_one_byte_is_another_is_refused(packed: bytes, tmp_path: Path) -> None:
    places = random.Random(1).sample(range(len(packed)), 40)
    for place in [*range(28), *places, len(packed) - 1]:
        damaged = bytearray(packed)
        damaged[place] ^= 0x40
        refused(bytes(damaged), tmp_path / "out", "stream")


def test_chunks_in_another_order_are_refused(tmp_path: Path) -> None:
    """Each chunk is whole: only the checksum at the end can tell."""
    chunks = [Frame(CHUNK, STORED, 1, 4, text) for text in (b"abcd", b"efgh")]
    payload = listing(("a.bin", 8))
    import hashlib

    digest = hashlib.sha256(payload.payload + b"abcdefgh").digest()
    end = Frame(END, STORED, 1, 32, digest)
    unpack_stream(io.BytesIO(stream_of(payload, *chunks, end)), tmp_path / "good")
    assert contents(tmp_path / "good") == {"a.bin": b"abcdefgh"}
    refused(stream_of(payload, *chunks[::-1], end), tmp_path / "out", "checksum of all files")


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "a\nb", "x" * 300, 3, None, ["a"]],
)
def test_names_that_are_no_plain_file_names_are_refused(tmp_path: Path, name: object) -> None:
    refused(stream_of(listing((name, 1))), tmp_path / "out", "names a file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "files, match",
    [
        ([("a", 1), ("a", 1)], "two files named"),
        ([("a", 1), ("A", 1)], "two files named"),
        ([("a", -1)], "no size"),
        ([("a", 1.5)], "no size"),
        ([("a", True)], "no size"),
        ([("a", 1 << 62)], "no size"),
        ([("a", 1 << 60)], "the disk of .* has"),
        ([(str(i), 0) for i in range(5000)], "5000 files"),
        ([], "0 files"),
    ],
)
def test_lists_that_claim_too_much_are_refused_before_anything_is_written(tmp_path: Path, files, match: str) -> None:
    refused(stream_of(listing(*files)), tmp_path / "out", match)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"files": 3}', b'{"files": [3]}', b'{"files": [{}]}', b"[" * 100_000])
def test_a_list_of_another_form_is_refused(tmp_path: Path, text: bytes) -> None:
    refused(stream_of(Frame(MANIFEST, STORED, 1, len(text), text)), tmp_path / "out", "list of files")


def test_frames_that_claim_much_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """What follows the head is missing: a reader that believed it would say that the stream is cut."""
    for kind, raw, size in [(CHUNK, 1, MAX_CHUNK + 1), (CHUNK, 1 << 31, 1), (MANIFEST, 1, 1 << 30), (9, 1, 1)]:
        head = struct.pack("<BBBBII", kind, 0, 1, 0, raw, size)
        refused(MAGIC + head + struct.pack("<I", zlib.crc32(head)), tmp_path / "out", "no frame begins")


def test_a_chunk_that_holds_more_than_it_says_is_never_inflated(tmp_path: Path) -> None:
    """64 MB of zeros in a few kB."""
    zeros = bytes(64 << 20)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bombs = [(DEFLATE, squeeze.compress(zeros) + squeeze.flush())]
    zstandard = pytest.importorskip("zstandard")
    bombs.append((ZSTD, zstandard.ZstdCompressor().compress(zeros)))
    # A frame that claims a window of a gigabyte.
    options = zstandard.ZstdCompressionParameters(window_log=30)
    writer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    bombs.append((ZSTD, writer.compress(b"a" * 2000) + writer.flush()))
    for codec, payload in bombs:
        data = stream_of(listing(("a", 1000)), Frame(CHUNK, codec, 1, 1000, payload))
        refused(data, tmp_path / "out", "damaged")


@pytest.mark.parametrize(
    "frame, match",
    [
        (Frame(CHUNK, STORED, 1, 0, b""), "does not have the bytes"),
        (Frame(CHUNK, STORED, 1, 9, b"123456789"), "does not have the bytes"),
        (Frame(CHUNK, STORED, 1, 8, b"1234"), "has others"),
        (Frame(CHUNK, STORED, 3, 6, b"123456"), "numbers of 3 bytes"),
        (Frame(CHUNK, STORED, 4, 6, b"123456"), "numbers of 4 bytes"),
        (Frame(CHUNK, 7, 1, 8, b"12345678"), "compression 7"),
        (Frame(CHUNK, DEFLATE, 1, 8, b"12345678"), "decompressed"),
        (Frame(END, STORED, 1, 32, bytes(32)), "does not have the bytes"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(tmp_path: Path, frame: Frame, match: str) -> None:
    refused(stream_of(listing(("a", 8)), frame), tmp_path / "out", match)


def test_other_streams_and_versions_are_named(tmp_path: Path) -> None:
    refused(b"PK\3\4 a zip file", tmp_path / "out", "no stream of hqqtensor pack")
    refused(MAGIC[:-1] + b"\x02", tmp_path / "out", "format version 2; this hqqtensor reads 1")
    refused(stream_of(Frame(END, STORED, 1, 0, b"")), tmp_path / "out", "begin with a list")


def test_a_directory_with_files_is_left_alone(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        unpack_stream(io.BytesIO(packed), tmp_path)
    assert contents(tmp_path) == {"mine": b"mine"}


def test_packing_refuses_what_cannot_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="no files"):
        pack_directory(tmp_path, io.BytesIO())
    with pytest.raises(ValueError, match="compression must be one of"):
        pack_directory(tmp_path, io.BytesIO(), "rar")
    (tmp_path / "a:b").write_text("x")
    with pytest.raises(TransferError, match="a:b"):
        pack_directory(tmp_path, io.BytesIO(), "deflate")


def test_a_file_that_changes_while_it_is_packed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(10 << 20))

    def shorten(done: int, total: int, name: str) -> None:
        os.truncate(tmp_path / name, 1000)

    with pytest.raises(TransferError, match="changed while it was packed"):
        pack_directory(tmp_path, io.BytesIO(), "deflate", shorten)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, struct.pack("<Q", 5) + b"{nope", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_safetensors_file_goes_over_as_it_is(tmp_path: Path, damage: bytes) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(3000)}, source / "good.safetensors")
    (source / "bad.safetensors").write_bytes(damage + bytes(100))
    stream = io.BytesIO()
    pack_directory(source, stream, "deflate")
    stream.seek(0)
    unpack_stream(stream, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_save_model_writes_one_packed_file_that_unpacks_to_what_it_would_have_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))
    quantize_(model, hqq_weight_only(8, 64))
    save_model(model, tmp_path / "model.hqqpack", compression="deflate", max_shard_size="20KB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.hqqpack"]
    with pytest.raises(InputError, match="hqqtensor unpack"):
        load_model(model, tmp_path / "model.hqqpack")
    with open(tmp_path / "model.hqqpack", "rb") as stream:
        unpack_stream(stream, tmp_path / "out")
    with torch.device("meta"):
        again = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))
    load_model(again, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for path, compression in ((tmp_path / "a.safetensors", "deflate"), (tmp_path, "deflate"), (tmp_path / "a", "rar")):
        with pytest.raises(ValueError, match=r"compress"):
            save_model(model, path, compression=compression)
