"""Folders beside a place that is being written, with a lock that goes with their process, so that what a process left
that was killed is told from the work of one that is alive."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hqqtensor.whole_file import close_unchanged

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def work_prefix(place: Path) -> str:
    """How folders beside ``place`` begin that are of use only to the process that works there, and else are removed."""
    return f".{place.name}.hqqtensor-"


@contextlib.contextmanager
def scratch_beside(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, for files that go there by a rename; removed at the end, whatever ends it.

    Folders of processes that were killed are removed first. OSError where the folder cannot be made.
    """
    for left in left_beside(place):
        with locked(left) as is_ours:
            if is_ours:
                shutil.rmtree(left, ignore_errors=True)
    with new_locked_folder(place) as work:
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)  # of an error here the next save takes care


def left_beside(place: Path) -> list[Path]:
    """The folders of all processes that work on ``place``, or did until they were killed."""
    name = re.compile(re.escape(work_prefix(place)) + r"[a-z0-9_]+")  # as mkdtemp makes them
    try:
        return [path for path in place.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]
    except OSError:  # no such directory yet
        return []


@contextlib.contextmanager
def new_locked_folder(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, private to the user, locked as long as the block runs; it is not removed."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=work_prefix(place), dir=place.parent))
        with locked(work) as is_ours:
            if is_ours is False or not work.exists():  # another process took it for one that was left
                continue
            yield work
            return


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold the lock of a folder. Yields False where another process has it, None where the system has no locks.

    The lock goes with its process, however that ends.
    """
    if fcntl is None:
        yield None
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has removed it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours: bool | None = True
        except BlockingIOError:
            is_ours = False
        except OSError:  # the file system has none
            is_ours = None
        yield is_ours
    finally:
        close_unchanged(handle)
