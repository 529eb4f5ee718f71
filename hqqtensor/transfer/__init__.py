"""Model directories as one compressed stream, for a file, a pipe or a socket (docs/transfer.md)."""

from hqqtensor.transfer.codecs import check_compression
from hqqtensor.transfer.frames import TransferError, is_packed
from hqqtensor.transfer.pack import PackSummary, pack_directory
from hqqtensor.transfer.unpack import unpack_stream

__all__ = ["PackSummary", "TransferError", "check_compression", "is_packed", "pack_directory", "unpack_stream"]
