"""The process that reads damaged inputs: ``python -m fuzz.child TARGETS FIRST COUNT SECONDS PROGRESS FOLDER``.

Before each input it writes the target's place in the list and the input's number to the file PROGRESS, so that whoever
started it knows which one it died of. Its standard output is lines of JSON: one for each finding, and one after each
target that says how many inputs were taken and refused.
"""

import contextlib
import functools
import gc
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRESS = struct.Struct("<QQ")
MEMORY = 1 << 30
"""Bytes of address space that an input may take beyond what the process has before."""
PEAK = 8 << 20
"""Bytes that an input of files may take beyond twice its size, with all that is done to check the answer."""
WARM_UP = 50
"""Inputs, at most. What the first one that is taken imports and allocates for good is not that input's."""
CPU_SECONDS = 10.0
"""Of all threads together. Time on a clock would count another program's work."""


def make_case(target: Any, number: int) -> Any:
    """The input of a number, the same in every process."""
    import torch

    # torch.manual_seed would also ask for every other device's generator, which takes longer than most inputs do.
    torch.default_generator.manual_seed(number % 2**63)
    return target.case(random.Random(f"{target.name} {number}"))


def write_files(case: Any, folder: Path) -> int | None:
    """Write a case that is made of files; their bytes in all, None where it is not."""
    if not isinstance(case, dict) or not all(isinstance(content, bytes) for content in case.values()):
        return None
    for name, content in case.items():
        with open(f"{folder}/{name}", "wb", buffering=0) as file:
            file.write(content)
    return sum(map(len, case.values()))


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@functools.cache
def _opened(path: str, flags: int) -> int:
    """A file of the kernel, opened once: to open it takes longer than to read it."""
    return os.open(path, flags)


def _memory(key: bytes) -> int:
    """A line of this process's status in the kernel's books, in bytes."""
    status = os.pread(_opened("/proc/self/status", os.O_RDONLY), 8192, 0)
    return int(status.partition(key + b":")[2].split(maxsplit=1)[0]) * 1024


@contextlib.contextmanager
def _peak_bounded(size: int | None) -> Iterator[None]:
    """MemoryError where an input of ``size`` bytes made the process larger than it may, by pages in use."""
    if size is not None:
        os.pwrite(_opened("/proc/self/clear_refs", os.O_WRONLY), b"5", 0)  # the peak begins anew
        before = _memory(b"VmRSS")
    try:
        yield
    finally:
        if size is not None and (peak := _memory(b"VmHWM") - before) > 2 * size + PEAK:
            raise MemoryError(f"an input of {size} bytes took {peak} bytes of memory, more than twice that and {PEAK}")


def _empty(folder: Path) -> None:
    """Make the folder, or remove what is in it: to remove the folder as well takes longer than most inputs do."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def run_one(target: Any, number: int, folder: Path) -> tuple[str, str]:
    """("taken", ""), ("refused", "") or ("finding", what happened)."""
    _empty(folder)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        case = make_case(target, number)
        size = write_files(case, folder)
        with _peak_bounded(size):
            target.run(case, folder)
        return "taken", ""
    except target.refusals as error:
        text = str(error)
        out_of_memory = "can't allocate memory" in text or "Cannot allocate memory" in text
        return ("finding", text) if out_of_memory else ("refused", "")
    except Exception:
        return "finding", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(names: list[str], first: int, count: int, seconds: float, progress: str, folder: str) -> None:
    """``seconds`` and ``count`` are for each target."""
    import torch

    from fuzz.targets import TARGETS

    torch.set_num_threads(1)
    place = Path(folder, "case")
    with open(progress, "r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as current:
        # Until one is taken: makes the seeds and what else is made once, before memory is counted and limited.
        for name in names:
            for number in range(first, first + min(count, WARM_UP)):
                current[:] = PROGRESS.pack(0, number)
                if run_one(TARGETS[name], number, place)[0] == "taken":
                    break
        limit_memory()
        gc.collect()
        gc.freeze()  # what was imported need not be looked through again and again
        for order, name in enumerate(names):
            counts: dict[str, Any] = {"target": name, "taken": 0, "refused": 0}
            end = time.monotonic() + seconds
            for number in range(first, first + count):
                if time.monotonic() > end:
                    break
                current[:] = PROGRESS.pack(order, number)
                kind, text = run_one(TARGETS[name], number, place)
                if kind == "finding":
                    print(json.dumps({"target": name, "number": number, "text": text}), flush=True)
                else:
                    counts[kind] += 1
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5], sys.argv[6])
