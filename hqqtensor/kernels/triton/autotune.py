"""Timing of tiles on the device at hand, off unless asked for, and a file that remembers what won.

Set ``HQQTENSOR_AUTOTUNE=1`` to time each new shape when it is first met. The file (``HQQTENSOR_AUTOTUNE_CACHE``, or
``~/.cache/hqqtensor/triton.json``) may be shared by processes: it is replaced whole, under a lock, with what others
have written in between merged in, and every entry is checked when it is read.
"""

import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from hqqtensor.kernels.triton.config import SUMS_UP_TO, Device, Plan, Problem, Tile, plan, shipped

FILE_VERSION = 4
"""Goes up with every change of the kernels or the entries: times of others say nothing then."""
_remembered: dict[str, Tile] | None = None


def enabled() -> bool:
    return os.environ.get("HQQTENSOR_AUTOTUNE", "0") == "1"


def path() -> Path:
    """Where results are kept."""
    given = os.environ.get("HQQTENSOR_AUTOTUNE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "hqqtensor" / "triton.json"


def choose(
    problem: Problem, device: Device, dtype: str, kind: int, run: Callable[[Plan], None],
    bench: Callable[[Callable[[], None]], float] | None = None,
) -> Plan | None:  # fmt: skip
    """The remembered or now timed plan of a problem, or None where autotuning is off.

    run launches a plan; bench gives the time of a call (default: ``triton.testing.do_bench``).
    """
    global _remembered
    if not enabled():
        return None
    if _remembered is None:
        _remembered = read(path())
    name = key(problem, device, dtype, kind)
    if name not in _remembered:
        time = bench or triton.testing.do_bench
        candidates = {plan(problem, device, tile).tile for tile in tiles(problem, device)}
        times = {tile: _time(partial(run, plan(problem, device, tile)), time) for tile in candidates}
        best = min(times, key=lambda tile: times[tile])
        if times[best] == float("inf"):
            raise RuntimeError(f"autotuning: no tile runs on {device.arch} for {problem}")
        _remembered = write(path(), {name: best})
    return plan(problem, device, _remembered[name])


def _time(call: Callable[[], None], bench: Callable[[Callable[[], None]], float]) -> float:
    try:
        return bench(call)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def key(problem: Problem, device: Device, dtype: str, kind: int) -> str:
    """Everything that a time depends on; rows of x count by the power of two they round up to."""
    rows = 1 << (problem.M - 1).bit_length()
    about = replace(problem, M=rows)
    versions = f"torch {torch.__version__} triton {triton.__version__} file {FILE_VERSION}"
    return f"{versions} {device.arch} x{device.processors} {dtype} kind {kind} {sorted(asdict(about).items())}"


def tiles(problem: Problem, device: Device) -> list[Tile]:
    """Tiles worth timing: the shipped one first, then its neighbours."""
    base = plan(problem, device).tile
    out = [base]
    splits = sorted({max(1, base.split_k // 2), base.split_k, min(32, base.split_k * 2)})
    for split in splits if problem.M <= SUMS_UP_TO else [1]:
        for block_n in sorted({32, 64, 128, base.block_n}):
            for warps in (2, 4) if problem.M <= SUMS_UP_TO else (4, 8):
                for stages in (2, 3, 4):
                    out.append(replace(base, block_n=block_n, warps=warps, stages=stages, split_k=split))
    for tile in shipped(device.arch).values():
        if problem.M > SUMS_UP_TO and tile.block_m > 16:
            out.append(tile)
    return list(dict.fromkeys(out))


def read(file: Path) -> dict[str, Tile]:
    """The entries of a file that are what this version writes; others are left out with a warning, a missing file is
    empty."""
    try:
        content: Any = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"autotuning: {file} cannot be read ({error}); it starts anew", stacklevel=2)
        return {}
    if not isinstance(content, dict):
        warnings.warn(f"autotuning: {file} is not a table; it starts anew", stacklevel=2)
        return {}
    good: dict[str, Tile] = {}
    for name, entry in content.items():
        try:
            good[name] = Tile(**entry)
        except (TypeError, ValueError) as error:
            warnings.warn(f"autotuning: {file}: entry {name!r} is left out ({error})", stacklevel=2)
    return good


def write(file: Path, new: dict[str, Tile]) -> dict[str, Tile]:
    """Add entries to the file and give all that it then holds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = {**read(file), **new}
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump({key: asdict(tile) for key, tile in merged.items()}, out, indent=1)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    return merged
