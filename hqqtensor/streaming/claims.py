"""Which batches are finished, and which process works on which.

    journal    a record for each batch, written once its data are on disk
    claims     an empty file: byte ranges of it are locked, those of batches from ``_FIRST_BATCH`` on

A lock on a byte range goes with its process, however that ends, and is seen by processes on other machines where the
file system is shared. So what a dead process had claimed is free for the others at once.
"""

import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hqqtensor.streaming.source import NotStreamable
from hqqtensor.whole_file import close_unchanged

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CLAIMS, JOURNAL = "claims", "journal"
_RECORD = struct.Struct("<4sII")  # a mark, the batch's number, and a checksum of these and the run
_MARK = b"done"
_SETUP, _AT_WORK, _FINISH, _FIRST_BATCH = 0, 1, 2, 16


class Claims:
    """The claims and the journal of one run, for one process. ``key`` tells the run from others.

    NotStreamable where the system has no locks, OSError where the file system has none.
    """

    def __init__(self, folder: Path, key: str) -> None:
        if fcntl is None:
            raise NotStreamable("this system has no file locks")
        self.key = key.encode()
        self.locks = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT, 0o644)
        self.journal = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Give up all claims."""
        close_unchanged(self.journal)
        close_unchanged(self.locks)

    def is_in(self, folder: Path) -> bool:
        """Whether the files are those of the folder, which another process may have removed since."""
        try:
            return os.path.samestat(os.fstat(self.locks), os.stat(folder / CLAIMS))
        except FileNotFoundError:
            return False

    def claim(self, batch: int) -> bool:
        """Claim a batch for this process; whether no other has it."""
        return self._lock(_FIRST_BATCH + batch, fcntl.LOCK_EX)

    def join(self, alone: bool) -> bool:
        """Say that this process is at work, alone or with others that say the same; whether it may."""
        return self._lock(_AT_WORK, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Whether no other process is at work, and none can begin as long as this one is."""
        return self._lock(_AT_WORK, fcntl.LOCK_EX)

    def finish(self) -> bool:
        """Claim the end of the run; whether no other process has it."""
        return self._lock(_FINISH, fcntl.LOCK_EX)

    @contextmanager
    def setting_up(self, patience: float) -> Iterator[None]:
        """Wait until no other process sets the folder up, which takes moments; TimeoutError after ``patience`` s."""
        until = time.monotonic() + patience
        while not self._lock(_SETUP, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise TimeoutError(f"another process has been setting up its folder for {patience:.0f} s")
            time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, _SETUP)

    def holder(self, batch: int) -> int | None:
        """The process that has claimed a batch, by its number on its machine; None where none has."""
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _FIRST_BATCH + batch, 1, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(self.locks, fcntl.F_GETLK, query))
        return None if kind == fcntl.F_UNLCK else pid

    def is_done(self, batch: int) -> bool:
        """Whether a batch is finished."""
        return os.pread(self.journal, _RECORD.size, batch * _RECORD.size) == self._record(batch)

    def done(self, count: int) -> set[int]:
        """The finished ones of the first ``count`` batches."""
        data = os.pread(self.journal, count * _RECORD.size, 0)
        size = _RECORD.size
        return {batch for batch in range(count) if data[batch * size : (batch + 1) * size] == self._record(batch)}

    def set_done(self, batch: int) -> None:
        """Record that a batch is finished: its data are on disk."""
        os.pwrite(self.journal, self._record(batch), batch * _RECORD.size)

    def forget(self, batches: Iterable[int]) -> None:
        """Take back that batches are finished."""
        for batch in batches:
            os.pwrite(self.journal, bytes(_RECORD.size), batch * _RECORD.size)

    def _record(self, batch: int) -> bytes:
        return _RECORD.pack(_MARK, batch, zlib.crc32(self.key + batch.to_bytes(4, "little")))

    def _lock(self, place: int, kind: int) -> bool:
        try:
            fcntl.lockf(self.locks, kind | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            return False
        except PermissionError:  # POSIX allows either
            return False
        return True
