"""``hqqtensor pack``: a model directory as one compressed file or stream."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hqqtensor.cli.errors import CommandError, UsageError, writing
from hqqtensor.cli.output import print_json, progress_on_stderr
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.serialization.scratch import scratch_beside
from hqqtensor.transfer import pack_directory


def run(args: argparse.Namespace) -> int:
    """Pack the directory and print what it gained, on stderr where the stream itself goes to stdout."""
    source: Path = args.dir
    if not source.is_dir():
        raise UsageError(f"{source} is not a directory")
    to_stdout = str(args.file) == "-"
    with _target(args.file, source, args.overwrite) as stream, progress_on_stderr("packing", not args.json) as progress:
        try:
            summary = pack_directory(source, stream, args.compression, progress)
        except BrokenPipeError:
            raise CommandError("the stream's reader stopped before its end") from None
    with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        _print(summary, args.json)
    return 0


def _print(summary: Any, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "files": summary.files,
                "raw_bytes": summary.raw_bytes,
                "packed_bytes": summary.packed_bytes,
                "skipped": summary.skipped,
            }
        )
        return
    share = summary.packed_bytes / max(1, summary.raw_bytes)
    sizes = f"{megabytes(summary.raw_bytes)} in {megabytes(summary.packed_bytes)} ({share:.1%})"
    print(f"{len(summary.files)} files, {sizes}")
    if summary.skipped:
        print(f"left out, as they are no files: {', '.join(summary.skipped)}")


@contextlib.contextmanager
def _target(path: Path, source: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """What to write to: stdout for "-", else a file that takes its name once it is whole."""
    if str(path) == "-":
        if sys.stdout.isatty():
            raise UsageError("FILE - writes the stream to stdout, which is a terminal; send it to a pipe or a file")
        yield sys.stdout.buffer
        return
    path = path.resolve()
    if path.is_dir():
        raise UsageError(f"FILE {path} is a directory")
    if path.exists() and not overwrite:
        raise UsageError(f"FILE {path} exists; --overwrite replaces it")
    if not path.parent.is_dir():
        raise UsageError(f"FILE {path} cannot be written: {path.parent} is not a directory")
    if source.resolve() == path.parent:
        raise UsageError(f"FILE {path} is in DIR, which would be packed into itself; choose another place")
    with writing(path), scratch_beside(path) as scratch:
        with open(scratch / path.name, "xb") as file:
            yield file
        os.replace(scratch / path.name, path)
