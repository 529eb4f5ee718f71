"""The errors of the commands. Their kind decides the exit code (docs/cli.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CommandError(Exception):
    """The work failed; the message is shown as it is and the exit code is 1."""


class UsageError(CommandError):
    """The command cannot run as written, and another command line mends it; exit code 2."""


@contextmanager
def from_arguments() -> Iterator[None]:
    """A ValueError or TypeError within the block, which only checks what the arguments say, is a UsageError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def from_files() -> Iterator[None]:
    """An InputError within the block, which reads files, is a UsageError: nothing is damaged, the request is wrong."""
    from hqqtensor.serialization.layout import InputError

    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the file system within the block is a CommandError that names ``path``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CommandError(f"cannot write {path}: {error}") from error
