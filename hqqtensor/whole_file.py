"""Files that are written whole or not at all, and errors that name them."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PART = ".part"
"""Ending of a file that is being written."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError within the block that names no file, as those of writes and closes do, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from error


def close_unchanged(handle: int) -> None:
    """Close a file that was only read, or whose bytes are on disk already: an error then says nothing of them."""
    with contextlib.suppress(OSError):
        os.close(handle)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file that is only read, so that an error of closing it says nothing."""
    file = open(path, "rb")  # noqa: SIM115
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def sync_to_disk(path: Path) -> None:
    """Return when the bytes of a file, or the names in a folder, are on disk: they then outlast a loss of power.

    OSError names it.
    """
    if os.name == "nt":  # opens no folders
        return
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            close_unchanged(handle)


def write_whole(folder: Path, name: str, write: Callable[[Any], Any]) -> None:
    """Write a file beside its place, then rename it: whatever stops this, the old file or the new one is there, whole.

    What a kill leaves has the ending ``PART``, and the next call for the same file writes over it. OSError names the
    file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}{PART}"
    try:
        with naming(folder / name):
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_text_whole(path: Path, text: str) -> None:
    """``write_whole`` for a text in UTF-8, at the end of a symbolic link; what is no file (/dev/stdout) is written to.

    OSError where the folder of ``path`` is not there.
    """
    path = path.resolve()
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        path.write_text(text, encoding="utf-8")
    else:
        write_whole(path.parent, path.name, lambda file: file.write(text.encode()))
