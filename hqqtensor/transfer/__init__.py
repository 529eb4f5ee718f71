"""Model directories as one compressed stream, for a file, a pipe or a socket (docs/transfer.md)."""

from hqqtensor.transfer.frames import TransferError
from hqqtensor.transfer.pack import PackSummary, pack_directory
from hqqtensor.transfer.unpack import unpack_stream

__all__ = ["PackSummary", "TransferError", "pack_directory", "unpack_stream"]
