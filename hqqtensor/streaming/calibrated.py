"""Calibrated quantization of a model that lies on disk, one dense block in memory at a time.

What is finished lies in the folder of the calibration: the quantized weights of each block, and the hidden states that
the next one needs. ``work`` then copies the weights to their places in the output.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hqqtensor.calibration import Calibration
from hqqtensor.calibration.apply import check_plan, quantize_calibrated
from hqqtensor.calibration.blocks import block_lists
from hqqtensor.calibration.data import Source as Data
from hqqtensor.calibration.resume import ResumeFolder, calibrated
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.selection import counting
from hqqtensor.streaming.plan import Plan
from hqqtensor.streaming.resources import available_memory
from hqqtensor.streaming.source import Source
from hqqtensor.streaming.targets import Target, find_targets, ties
from hqqtensor.streaming.work import Progress
from hqqtensor.weight_error import WeightError


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on and how: as the arguments ``calibration`` and ``tokenizer`` of ``quantize_``, and the mode.

    label: a text that tells this request from others, for the record of the run.
    """

    source: Data | Calibration
    mode: str
    label: str
    tokenizer: Any = None


@contextlib.contextmanager
def offloaded(model: nn.Module, source: Source) -> Iterator[OffloadedBlocks]:
    """``model`` (on the meta device, tied) as one that runs, its blocks read from ``source`` as they are needed.

    Blocks are those of its lists of layers. A model without any is in memory as a whole. Errors as ``find_targets``.
    """
    targets = find_targets(model, source)
    by_name: dict[str, Target] = {}
    for names in ties(model.state_dict(keep_vars=True)):
        by_name |= dict.fromkeys(names, next(targets[name] for name in names if name in targets))
    blocks = [name for names in block_lists(model) for name in names]
    loaded = OffloadedBlocks(model, blocks, lambda name: by_name[name].read(source))
    try:
        yield loaded
    finally:
        loaded.close()


def quantize_blocks(
    plan: Plan, source: Source, request: CalibrationRequest, folder: Path, progress: Progress | None = None,
    error: WeightError | None = None,
) -> dict[int, nn.Parameter]:  # fmt: skip
    """The quantized weights of the layers that the calibration sees, by the id of the plan's: mapped from ``folder``.

    Goes on with what ``folder`` has of the same call, and gives the same weights then. The model of ``plan`` is left as
    it was. Where the model writes its own text, its blocks stay in memory meanwhile as far as half of what is free
    suffices; the others are read again for each token. ResumeError and ValueError as ``quantize_`` has them.
    """
    choices = [unit.choice for unit in plan.units if unit.choice is not None]
    report = counting(choices, progress)
    kept = ResumeFolder(folder, is_mapped=True)
    kept.describe(plan.model, plan.run["settings"], [choice.names[0] for choice in choices], plan.run["model"])
    with offloaded(plan.model, source) as blocks:
        is_writing = request.source == "self" and not kept.has_batches
        with blocks.keeping(memory_to_use() if is_writing else 0):
            calibration = calibrated(plan.model, request.source, request.mode, request.tokenizer, progress, kept)
        check_plan(choices, calibration)
        return quantize_calibrated(plan.model, choices, calibration, report, kept, blocks, error)


def memory_to_use() -> int:
    """Bytes of dense blocks that stay in memory where they are needed again and again: half of what is free."""
    available = available_memory()
    return 0 if available is None else available // 2
