"""``hqqtensor quantize`` from files: tensor by tensor or block by block, alone or with other processes."""

import argparse
import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtensor import HqqConfig
from hqqtensor.cli import calibration, model_dir, search
from hqqtensor.cli.errors import UsageError, writing
from hqqtensor.cli.model_source import ModelSource
from hqqtensor.cli.output import progress_on_stderr
from hqqtensor.cli.summary import Summary
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.left_dense import left_dense
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.quantize import QUALITIES
from hqqtensor.run_record import ResumeError, is_begun
from hqqtensor.streaming import (
    CalibrationRequest,
    NotStreamable,
    Source,
    folder_of,
    is_written,
    make_plan,
    memory_to_use,
    offloaded,
    quantize_files,
)
from hqqtensor.weight_error import WeightError

if TYPE_CHECKING:
    from hqqtensor.calibration.data import Text


@dataclass(frozen=True)
class Task:
    """What ``quantize`` is to do, checked: the model, where it goes, the settings.

    settings: of the dense model's config.json. target_bytes: what a search may take. text: what it measures on, None
    for random tokens. to_calibrate_on: the text that ``--calibrate`` names.
    """

    source: ModelSource
    out: Path
    config: HqqConfig
    settings: dict[str, Any]
    target_bytes: int | None
    text: str | None
    to_calibrate_on: "Text | None"


def is_together(args: argparse.Namespace) -> bool:
    """Whether other processes are given the same command: by ``--workers-join``, or by torchrun."""
    return args.workers_join or os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError where several processes cannot share what the arguments ask for."""
    if is_together(args) and (calibration.is_calibrated(args) or search.is_search(args)):
        raise ValueError("several processes (--workers-join, torchrun) share no calibration and no search")


@contextlib.contextmanager
def opened(source: ModelSource, args: argparse.Namespace) -> Iterator[Source | None]:
    """The files of the dense model; None where it has to be opened whole."""
    try:
        files = source.open_files()
    except NotStreamable as error:
        say_why_not(error, args)
        yield None
        return
    try:
        yield files
    finally:
        files.close()


def say_why_not(error: NotStreamable, args: argparse.Namespace) -> None:
    """Say on stderr that the model is opened whole, and why; UsageError where several processes were to share it."""
    if is_together(args):
        raise UsageError(f"{args.model_dir}: several processes cannot share it: {error}") from None
    print(f"hqqtensor: {args.model_dir} is opened whole, as {error}", file=sys.stderr)


def run(files: Source, empty: Any, task: Task, args: argparse.Namespace) -> Summary | None:
    """Quantize and write; None where another process did the last step, and reports.

    empty: the model on the meta device. NotStreamable, before anything is done, where it has to be opened whole.
    """
    source, out, config, together = task.source.directory, task.out, task.config, is_together(args)
    options = calibration.arguments_of_quantize(empty, task.to_calibrate_on, source, args)
    if options.get("calibration") == "self" and not args.json:
        _say_if_read_for_each_token(empty)
    measured = None
    if search.is_search(args):
        with offloaded(empty, files) as blocks, blocks.keeping(memory_to_use()):
            config, measured = search.run(empty, config, task.target_bytes, task.text, source, options, args, blocks)
    request = _request(options, args)
    plan = make_plan(empty, files, config, args.max_shard_size, None if request is None else request.label)
    if together and not is_written(out, plan):
        model_dir.check_output(out, source, args.overwrite)
    before, dtype = model_size(empty), next(empty.parameters()).dtype
    complete = functools.partial(
        model_dir.complete, source=source, settings=task.settings, config=config, dtype=dtype, name=task.source.name
    )
    folder = folder_of(out)
    if is_begun(folder) and not (args.json or together):
        print(f"going on with what an interrupted run left in {folder}", file=sys.stderr)
    if request is None:
        _use_memory_again()
    error = WeightError()
    started = time.perf_counter()
    try:
        with (
            writing(out),
            progress_on_stderr("quantizing", not args.json, "weights", lambda: _text_of(error)) as progress,
        ):
            is_ours = quantize_files(files, plan, out, complete, progress, together, calibration=request, error=error)
    except ResumeError as problem:
        raise UsageError(str(problem)) from problem
    except BaseException:
        if is_begun(folder):
            print(f"what is finished is kept in {folder}: the same command goes on from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - started
    if not is_ours and not args.json:
        print(f"{out} was put into its place by another process", file=sys.stderr)
        return None
    return Summary(before, model_size(empty), left_dense(empty, config), seconds, config, measured, error.relative)


def _request(options: dict[str, Any], args: argparse.Namespace) -> CalibrationRequest | None:
    """What to calibrate on, by the arguments of ``quantize_``."""
    if "calibration" not in options:
        return None
    label = f"{options['quality']}, on {args.calibrate or 'what fits the model'}"
    return CalibrationRequest(options["calibration"], QUALITIES[options["quality"]], label, options.get("tokenizer"))


def _say_if_read_for_each_token(empty: Any) -> None:
    nbytes, limit = model_size(empty).nbytes, memory_to_use()
    if nbytes > limit:
        print(
            f"hqqtensor: the dense model ({megabytes(nbytes)}) is larger than half of the free memory "
            f"({megabytes(limit)}): what does not fit is read again for each token that it writes; "
            "--calibrate random needs none",
            file=sys.stderr,
        )


def _text_of(error: WeightError) -> str:
    return "" if error.relative is None else f"error so far {100 * error.relative:.2f} %"


def _use_memory_again() -> None:
    """Let large blocks that were freed serve the next tensor: the system clears each that it gives anew, which takes a
    fifth of the time. For a process that does nothing else; without glibc nothing happens.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    with contextlib.suppress(AttributeError, OSError):
        for parameter in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(parameter, most)
