"""Peak memory of a call, on Linux."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def resident() -> int:
    """Bytes of this process in memory, after what was freed is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_over(run: Callable[[], object]) -> int | None:
    """Most bytes that ``run`` added to what is resident, its result included; None where that cannot be told.

    Memory that was freed before but kept by the allocator is given back first, so that it does not hide any.
    """
    try:
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (OSError, AttributeError, StopIteration):
        return None
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before
