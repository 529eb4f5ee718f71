"""How a chunk of bytes is made smaller, and back again with its size known beforehand."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hqqtensor.transfer.frames import MAX_CHUNK, Frame, TransferError

STORED, DEFLATE, ZSTD = 0, 1, 2
COMPRESSIONS = ("zstd", "deflate", "none")
"""zstandard's, Python's own, and checksums alone."""
STRIDES = (1, 2, 4, 8)
ZSTD_LEVEL = 1
"""Higher levels look for repeated strings, of which packed codes have none: they are slower and gain nothing."""


def check_compression(name: str) -> None:
    """ValueError for a name that is not in ``COMPRESSIONS``, ImportError where its package is missing."""
    if name not in COMPRESSIONS:
        raise ValueError(f"compression must be one of {list(COMPRESSIONS)}, got {name!r}")
    if name == "zstd":
        _zstandard()


def compress(name: str) -> Callable[[bytes, int], tuple[int, bytes]]:
    """What compresses a chunk of numbers of so many bytes each: its codec and its bytes, shorter or stored as they are.

    The bytes of numbers are sorted by their place: exponents, which are alike, come to lie together. ImportError where
    the package is missing.
    """
    if name == "none":
        return lambda raw, stride: (STORED, raw)
    squeeze, codec = _deflate, DEFLATE
    if name == "zstd":
        squeeze, codec = _zstandard().ZstdCompressor(level=ZSTD_LEVEL).compress, ZSTD

    def run(raw: bytes, stride: int) -> tuple[int, bytes]:
        body = squeeze(_planes(raw, stride))
        return (codec, body) if len(body) < len(raw) else (STORED, raw)

    return run


def decompress(frame: Frame) -> bytes:
    """The ``raw_size`` bytes of a chunk; TransferError where it holds others or more, which are never made."""
    if frame.stride not in STRIDES or frame.raw_size % frame.stride:
        raise TransferError(f"the stream is damaged: a chunk has numbers of {frame.stride} bytes")
    if frame.codec == STORED:
        raw = frame.payload
    elif frame.codec == DEFLATE:
        raw = _inflate(frame)
    elif frame.codec == ZSTD:
        raw = _unzstd(frame)
    else:
        raise TransferError(f"the stream has a chunk of compression {frame.codec}, which this hqqtensor does not know")
    if len(raw) != frame.raw_size:
        raise TransferError(f"the stream is damaged: a chunk of {frame.raw_size} bytes has others")
    return raw if frame.codec == STORED else _from_planes(raw, frame.stride)


def _planes(raw: bytes, stride: int) -> bytes:
    return raw if stride == 1 else np.frombuffer(raw, np.uint8).reshape(-1, stride).T.tobytes()


def _from_planes(raw: bytes, stride: int) -> bytes:
    return raw if stride == 1 else np.frombuffer(raw, np.uint8).reshape(stride, -1).T.tobytes()


def _deflate(raw: bytes) -> bytes:
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return squeeze.compress(raw) + squeeze.flush()


def _inflate(frame: Frame) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(frame.payload, frame.raw_size + 1)
    except zlib.error:
        raise TransferError("the stream is damaged: a chunk cannot be decompressed") from None


def _unzstd(frame: Frame) -> bytes:
    zstandard = _zstandard()
    try:
        # A window bounds what the decoder allocates, whatever the chunk claims.
        reader = zstandard.ZstdDecompressor(max_window_size=2 * MAX_CHUNK).stream_reader(frame.payload)
        return reader.read(frame.raw_size + 1)
    except zstandard.ZstdError:
        raise TransferError("the stream is damaged: a chunk cannot be decompressed") from None


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "zstd compression needs zstandard (pip install 'hqqtensor[transfer]', or choose deflate)"
        ) from error
    return zstandard
