"""What a run that may be interrupted is, in a file: the same call goes on from there, and another is refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.whole_file import write_whole

NAME = "run.json"
"""The file that says what the run is."""

_DIGESTS = ("names of the weights", "model", "calibrated on", "plan")


class ResumeError(ValueError):
    """The folder does not hold an interrupted run of the same call."""


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / NAME).is_file()


def begin(folder: Path, run: Mapping[str, Any]) -> None:
    """Write what the run is, which begins it. The values are plain: what JSON holds."""
    write_whole(folder, NAME, lambda file: file.write(json.dumps(run, indent=1).encode()))


def check_same(folder: Path, run: Mapping[str, Any]) -> None:
    """ResumeError, naming the differences, where the run that ``folder`` holds is of another call than ``run``."""
    try:
        kept = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no JSON, or nested too deeply to be ours
        kept = None
    if not isinstance(kept, dict):
        raise ResumeError(f"{folder / NAME} is damaged; remove the folder")
    different = _differences(kept, json.loads(json.dumps(run)))
    if different:
        raise ResumeError(
            f"{folder} holds an interrupted run of another call: {'; '.join(different)}. Go on with that call, "
            "or remove the folder"
        )


def digest(value: Any) -> str:
    """Equal for equal nested lists, tuples and mappings of tensors, numbers, text and bytes."""
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add([str(value.dtype), list(value.shape)])
            result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add([list(pair) for pair in value.items()])
        elif isinstance(value, (list, tuple)):
            result.update(f"{len(value)} of".encode())
            for each in value:
                add(each)
        else:
            plain = value is None or isinstance(value, (bool, int, float, str, bytes))
            result.update(repr(value if plain else type(value).__name__).encode())

    add(value)
    return result.hexdigest()[:32]


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, in words: settings one by one, digests by name."""
    different = []
    for key in {**kept, **now}:
        before, after = kept.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            different += _differences(before, after)
        elif before != after:
            different.append(f"{key} differs" if key in _DIGESTS else f"{key} was {before!r} and is {after!r}")
    return different
