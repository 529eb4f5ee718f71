"""``hqqtensor quantize`` without calibration and search: tensor by tensor, alone or with other processes."""

import argparse
import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hqqtensor import HqqConfig
from hqqtensor.cli import calibration, model_dir, search
from hqqtensor.cli.errors import UsageError, writing
from hqqtensor.cli.output import progress_on_stderr
from hqqtensor.cli.summary import Summary
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.left_dense import left_dense
from hqqtensor.run_record import ResumeError, is_begun
from hqqtensor.streaming import NotStreamable, Plan, Source, folder_of, is_written, make_plan, quantize_files


def is_together(args: argparse.Namespace) -> bool:
    """Whether other processes are given the same command: by ``--workers-join``, or by torchrun."""
    return args.workers_join or os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError where several processes cannot share what the arguments ask for."""
    if is_together(args) and (calibration.is_calibrated(args) or search.is_search(args)):
        raise ValueError("several processes (--workers-join, torchrun) share no calibration and no search")


@contextlib.contextmanager
def opened(source: Path, args: argparse.Namespace) -> Iterator[Source | None]:
    """The files of the dense model; None where it has to be opened whole."""
    files = None
    if not (calibration.is_calibrated(args) or search.is_search(args)):
        try:
            files = Source(source)
        except NotStreamable as error:
            _say_why_not(error, args)
    try:
        yield files
    finally:
        if files is not None:
            files.close()


def plan(empty: Any, files: Source, config: HqqConfig, args: argparse.Namespace) -> Plan | None:
    """The plan for ``empty``, the model on the meta device; None where it has to be opened whole."""
    try:
        return make_plan(empty, files, config, args.max_shard_size)
    except NotStreamable as error:
        _say_why_not(error, args)
        return None


def _say_why_not(error: NotStreamable, args: argparse.Namespace) -> None:
    if is_together(args):
        raise UsageError(f"{args.model_dir}: several processes cannot share it: {error}") from None
    print(f"hqqtensor: {args.model_dir} is opened whole, as {error}", file=sys.stderr)


def run(
    files: Source, plan: Plan, config: HqqConfig, settings: dict[str, Any], args: argparse.Namespace
) -> Summary | None:
    """Quantize and write; None where another process did the last step, and reports.

    settings: of the dense model's config.json.
    """
    source, out, together = args.model_dir.resolve(), args.out_dir.resolve(), is_together(args)
    if together and not is_written(out, plan):
        model_dir.check_output(out, source, args.overwrite)
    before, dtype = model_size(plan.model), next(plan.model.parameters()).dtype
    complete = functools.partial(model_dir.complete, source=source, settings=settings, config=config, dtype=dtype)
    folder = folder_of(out)
    if is_begun(folder) and not (args.json or together):
        print(f"going on with what an interrupted run left in {folder}", file=sys.stderr)
    _use_memory_again()
    started = time.perf_counter()
    try:
        with writing(out), progress_on_stderr("quantizing", not args.json, "weights") as progress:
            is_ours = quantize_files(files, plan, out, complete, progress, together)
    except ResumeError as error:
        raise UsageError(str(error)) from error
    except BaseException:
        if is_begun(folder):
            print(f"what is finished is kept in {folder}: the same command goes on from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - started
    if not is_ours and not args.json:
        print(f"{out} was put into its place by another process", file=sys.stderr)
        return None
    return Summary(before, model_size(plan.model), left_dense(plan.model, config), seconds, config)


def _use_memory_again() -> None:
    """Let large blocks that were freed serve the next tensor: the system clears each that it gives anew, which takes a
    fifth of the time. For a process that does nothing else; without glibc nothing happens.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    with contextlib.suppress(AttributeError, OSError):
        for parameter in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(parameter, most)
