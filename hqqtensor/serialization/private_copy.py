"""Where to map a file: itself, or a copy in memory, so that what becomes of the file later changes nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READ = 64 * 2**20  # bytes at a time, so that an interrupt ends it soon


@contextmanager
def place_to_map(path: Path, mmap: bool) -> Iterator[Path]:
    """Where to map ``path``: the file itself, or without ``mmap`` a copy in memory that belongs to this process.

    It is the same file within the block, also where another one takes its name meanwhile; what is mapped lives on.
    OSError where the file cannot be read or memory is short.
    """
    with open(path, "rb", buffering=0) as file:
        if mmap:
            place = Path(f"/proc/self/fd/{file.fileno()}")
            yield place if place.exists() else path  # Linux alone has such names
            return
        handle = os.memfd_create("hqqtensor")
        try:
            while os.sendfile(handle, file.fileno(), None, _READ):
                pass
            yield Path(f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)
