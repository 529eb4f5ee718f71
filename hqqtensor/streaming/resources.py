"""Whether disk and memory suffice, before the work begins."""

import contextlib
import shutil
from pathlib import Path

from hqqtensor.streaming.folder import folder_of
from hqqtensor.streaming.plan import Plan, Unit
from hqqtensor.streaming.work import AHEAD_BYTES

_SOLVING = 8  # bytes a weight at most while a weight is solved: two copies in float32
_SMALL_FILES = 64 * 2**20  # tokenizer, config, and what the file system needs for itself


class TooLittle(RuntimeError):
    """Disk or memory does not suffice; the message says how much there is."""


def check_resources(out: Path, plan: Plan, is_calibrated: bool = False) -> None:
    """TooLittle where disk or memory do not suffice to write ``out``.

    The disk has to take what is not written yet; a run that calibrates writes weights twice. Memory, of the machine or
    the control group, has to hold the largest weight while it is quantized.
    """
    place = next(parent for parent in out.parents if parent.exists())
    needed = missing_bytes(out, plan) + _SMALL_FILES
    if is_calibrated:
        needed += max(0, plan.nbytes - _bytes_in(folder_of(out) / "calibration"))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise TooLittle(f"{out} needs {_gigabytes(needed)} of disk, and {_gigabytes(free)} are free in {place}")
    largest = max(plan.units, key=memory_of)
    needed, available = memory_of(largest) + 2 * AHEAD_BYTES, available_memory()
    if available is not None and needed > available:
        raise TooLittle(
            f"{largest.name} {list(largest.target.shape)} needs {_gigabytes(needed)} of memory, and "
            f"{_gigabytes(available)} are available"
        )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0


def missing_bytes(out: Path, plan: Plan) -> int:
    """Bytes of the disk that the model's files will take and have not yet."""
    files = [folder_of(out) / "new" / shard.name for shard in plan.shards]
    return max(0, plan.nbytes - sum(file.stat().st_blocks * 512 for file in files if file.is_file()))


def memory_of(unit: Unit) -> int:
    """About how many bytes a unit takes while it is read and quantized."""
    target, share = unit.target, 1.0
    if unit.rows is not None:
        share = unit.rows / target.shape[0]
    # A conversion has its inputs, and a copy of them on the way, beside its result.
    read = target.nbytes_read * (1 if target.is_plain else 3)
    # Beside the one that is solved, one is read ahead, and one waits for the disk.
    return int(share * (2 * read + _SOLVING * unit.weights + 2 * unit.nbytes))


def available_memory() -> int | None:
    """Bytes that can be had without swapping, by the machine and by the control group; None where nothing tells."""
    candidates = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        used, limit = ((group / name).read_text() for name in ("memory.current", "memory.max"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("file", "0")
        candidates.append(int(limit) - int(used) + int(cached))
    return min(candidates, default=None)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
