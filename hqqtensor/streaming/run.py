"""A whole run: join its folder, work, and put the model into its place."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from hqqtensor.run_record import ResumeError
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.streaming.calibrated import CalibrationRequest, quantize_blocks
from hqqtensor.streaming.folder import Gone, RunFolder
from hqqtensor.streaming.plan import Plan
from hqqtensor.streaming.resources import check_resources
from hqqtensor.streaming.source import Source
from hqqtensor.streaming.work import Hung, Progress, Worker
from hqqtensor.weight_error import WeightError

PATIENCE = 600.0
"""Seconds after which a process that has a batch and writes nothing counts as hung."""

_POLL = 0.2


def quantize_files(
    source: Source, plan: Plan, out: Path, complete: Callable[[Path], None], progress: Progress | None = None,
    together: bool = False, patience: float = PATIENCE, calibration: CalibrationRequest | None = None,
    error: WeightError | None = None,
) -> bool:  # fmt: skip
    """Write the quantized model of ``plan`` to the directory ``out``; whether this process put it there.

    complete: adds to the folder that becomes ``out`` what belongs to it beside weights. together: other processes may
    be given the same call at the same time, and share the work. calibration: what to calibrate on first, block by
    block; ``plan`` was made with its label then. error: is told of each weight.
    The model of ``plan`` afterwards has what is stored, without numbers. Whatever stops this, the same call goes on
    with what is finished, which lies in ``out.unfinished`` until one rename; a model that was at ``out`` stays until
    then.

    ResumeError where that folder holds another run, or another process is at work on it; Hung where another one stopped
    working; TooLittle where disk or memory do not suffice; CheckpointError naming a file of the source that lacks what
    it had at first; ValueError naming a weight that cannot be quantized, which removes the folder.
    """
    if calibration is not None and together:
        raise ValueError("several processes cannot share a calibration")
    is_ours = False
    while not is_ours and not (together and is_written(out, plan)):
        check_resources(out, plan, calibration is not None)
        try:
            folder = RunFolder(out, plan, not together, patience)
        except Gone:
            if not together:
                raise
            continue
        try:
            is_ours = _work(folder, source, complete, progress, patience, calibration, error)
        finally:
            folder.close()
    plan.show_quantized(other_units(out, plan))
    return is_ours


def is_written(out: Path, plan: Plan) -> bool:
    """Whether ``out`` holds what the plan is for."""
    header = _header(out / plan.shards[0].name)
    return header.get("__metadata__") == plan.metadata and (out / "config.json").is_file()


def other_units(out: Path, plan: Plan) -> set[int]:
    """Numbers of the units whose scales are not of the planned dtype, from the files' headers."""
    other = set()
    for shard in plan.shards:
        header = _header(out / shard.name)
        for unit in shard.units:
            stored = [header.get(part.key, {}).get("dtype") for part in unit.parts if part.is_open]
            if "F32" in stored:
                other.add(unit.number)
    return other


def _work(
    folder: RunFolder, source: Source, complete: Callable[[Path], None], progress: Progress | None, patience: float,
    calibration: CalibrationRequest | None, error: WeightError | None,
) -> bool:  # fmt: skip
    try:
        quantized = {}
        if calibration is not None:
            quantized = quantize_blocks(folder.plan, source, calibration, folder.calibration, progress, error)
        Worker(folder, source, progress, quantized, error).run(patience)
    except BaseException as problem:
        # A weight that cannot be quantized would end the same call alike. A file can be put right, another call given.
        is_final = isinstance(problem, ValueError) and not isinstance(problem, (CheckpointError, ResumeError))
        if (is_final or not folder.holds_work) and folder.claims.is_alone():
            folder.remove()
        raise
    until = time.monotonic() + patience
    while folder.claims.is_in(folder.path):
        if folder.claims.finish() and folder.claims.is_in(folder.path):
            folder.finish(complete)
            return True
        if time.monotonic() > until:
            raise Hung(f"another process has been finishing {folder.out} for {patience:.0f} s; end it")
        time.sleep(_POLL)
    return False


def _header(file: Path) -> dict:
    try:
        with open(file, "rb") as stream:
            return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError):
        return {}
