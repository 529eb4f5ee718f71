"""A whole run: join its folder, work, and put the model into its place."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.streaming.folder import Gone, RunFolder
from hqqtensor.streaming.plan import Plan
from hqqtensor.streaming.resources import check_resources
from hqqtensor.streaming.source import Source
from hqqtensor.streaming.work import Hung, Progress, Worker

PATIENCE = 600.0
"""Seconds after which a process that has a batch and writes nothing counts as hung."""

_POLL = 0.2


def quantize_files(
    source: Source, plan: Plan, out: Path, complete: Callable[[Path], None], progress: Progress | None = None,
    together: bool = False, patience: float = PATIENCE,
) -> bool:  # fmt: skip
    """Write the quantized model of ``plan`` to the directory ``out``; whether this process put it there.

    complete: adds to the folder that becomes ``out`` what belongs to it beside weights. together: other processes may
    be given the same call at the same time, and share the work. The model of ``plan`` then has what is stored, without
    numbers. Whatever stops this, the same call goes on with what is finished, which lies in ``out.unfinished`` until
    one rename; a model that was at ``out`` stays until then.

    ResumeError where that folder holds another run, or another process is at work on it; Hung where another one stopped
    working; TooLittle where disk or memory do not suffice; CheckpointError naming a file of the source that lacks what
    it had at first; ValueError naming a weight that cannot be quantized, which removes the folder.
    """
    is_ours = False
    while not is_ours and not (together and is_written(out, plan)):
        check_resources(out, plan)
        try:
            folder = RunFolder(out, plan, not together, patience)
        except Gone:
            if not together:
                raise
            continue
        try:
            is_ours = _work(folder, source, complete, progress, patience)
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
    folder: RunFolder, source: Source, complete: Callable[[Path], None], progress: Progress | None, patience: float
) -> bool:
    try:
        Worker(folder, source, progress).run(patience)
    except BaseException as error:
        # A weight that cannot be quantized would end the same call alike. A file can be put right.
        is_final = isinstance(error, ValueError) and not isinstance(error, CheckpointError)
        if (is_final or not folder.claims.done(len(folder.plan.batches))) and folder.claims.is_alone():
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
