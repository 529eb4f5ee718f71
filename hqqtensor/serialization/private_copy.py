"""A file read into memory before it is mapped, so that what becomes of the file later changes nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READ = 64 * 2**20  # bytes at a time, so that an interrupt ends it soon


@contextmanager
def place_to_map(path: Path, mmap: bool) -> Iterator[Path]:
    """Where to map ``path``: the file itself, or without ``mmap`` a copy in memory that belongs to this process.

    The copy lives as long as something maps it; its place is good within the block. OSError where the file cannot be
    read or memory is short.
    """
    if mmap:
        yield path
        return
    handle = os.memfd_create("hqqtensor")
    try:
        with open(path, "rb", buffering=0) as file:
            while os.sendfile(handle, file.fileno(), None, _READ):
                pass
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
