"""``hqqtensor unpack``: the files of a packed model into a directory, whole or not at all."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hqqtensor.cli.errors import CommandError, UsageError, writing
from hqqtensor.cli.model_dir import check_output, written_at_once
from hqqtensor.cli.output import print_json, progress_on_stderr
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.transfer import TransferError, unpack_stream


def run(args: argparse.Namespace) -> int:
    """Unpack the stream beside OUT_DIR, move it there and print what came."""
    with _source(args.file) as stream:
        check_output(args.out_dir, Path("/dev/stdin") if str(args.file) == "-" else args.file, args.overwrite)
        with written_at_once(args.out_dir) as new, progress_on_stderr("unpacking", not args.json) as progress:
            try:
                with writing(args.out_dir):
                    files = unpack_stream(stream, new, progress)
                if stream.read(1):
                    raise TransferError("the stream goes on after its end")
            except TransferError as error:
                raise CommandError(f"{args.file}: {error}" if str(args.file) != "-" else str(error)) from None
    nbytes = sum(file.size for file in files)
    if args.json:
        print_json({"files": [file.name for file in files], "bytes": nbytes, "out": str(args.out_dir)})
    else:
        print(f"{len(files)} files, {megabytes(nbytes)}, in {args.out_dir}")
    return 0


@contextlib.contextmanager
def _source(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        if sys.stdin.isatty():
            raise UsageError("FILE - reads the stream from stdin, which is a terminal; give a pipe or a file")
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        yield file
