"""The process that reads damaged inputs: ``python -m fuzz.child TARGETS FIRST COUNT SECONDS PROGRESS FOLDER``.

Before each input it writes the target's place in the list and the input's number to the file PROGRESS, so that whoever
started it knows which one it died of. Its standard output is lines of JSON: one for each finding, and one after each
target that says how many inputs were taken and refused.
"""

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
from pathlib import Path
from typing import Any

PROGRESS = struct.Struct("<QQ")
MEMORY = 1 << 30
"""Bytes of address space that an input may take beyond what the process has before."""
CPU_SECONDS = 10.0
"""Of all threads together. Time on a clock would count another program's work."""


def make_case(target: Any, number: int) -> Any:
    """The input of a number, the same in every process."""
    import torch

    torch.manual_seed(number % 2**63)
    return target.case(random.Random(f"{target.name} {number}"))


def write_files(case: Any, folder: Path) -> None:
    if isinstance(case, dict) and all(isinstance(content, bytes) for content in case.values()):
        for name, content in case.items():
            (folder / name).write_bytes(content)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_one(target: Any, number: int, folder: Path) -> tuple[str, str]:
    """("taken", ""), ("refused", "") or ("finding", what happened)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        case = make_case(target, number)
        write_files(case, folder)
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
    for name in names:  # makes the seeds and imports what it needs, before memory is limited
        run_one(TARGETS[name], first, place)
    limit_memory()
    with open(progress, "r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as current:
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
