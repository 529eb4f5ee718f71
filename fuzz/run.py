"""Run a target in child processes, and keep what they find."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.child import CPU_SECONDS, PROGRESS

STUCK = 60.0
"""Seconds on the clock in which no input is finished and the child waits for something, not for a processor."""
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where inputs are written: a disk would take most of the time."""


@dataclass
class Result:
    """taken: inputs that gave an answer which stood every check. findings: numbers of inputs, and what happened.

    Inputs of a process that died are not counted, but for the one that it died of.
    """

    taken: int = 0
    refused: int = 0
    findings: dict[int, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.taken + self.refused + len(self.findings)


def run_in_parallel(name: str, first: int, count: int, seconds: float, jobs: int) -> Result:
    """Inputs of one target by ``jobs`` processes; where ``count`` is more than there is time for, each has a range."""
    share = min(-(-count // jobs), 2**32)
    starts = [first + job * share for job in range(jobs)]
    counts = [min(share, first + count - start) for start in starts]
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda start, some: run_targets([name], start, some, seconds)[name], starts, counts)
        total = Result()
        for result in results:
            total.taken += result.taken
            total.refused += result.refused
            total.findings |= result.findings
    return total


def run_targets(names: list[str], first: int, count: int, seconds: float) -> dict[str, Result]:
    """Inputs ``first`` to ``first + count - 1`` of each target, as many as ``seconds`` for each allow.

    After an input that ends its process, the target goes on with the next one in a new process.
    """
    results = {name: Result() for name in names}
    left, start = list(names), first
    while left:
        begun = time.monotonic()
        done, reached = _run_child(left, start, first + count - start, seconds, results)
        if done == len(left):
            break
        spent = time.monotonic() - begun
        left, start = left[done:], reached + 1
        if start >= first + count or spent > seconds:
            left, start = left[1:], first
    return results


def _run_child(names: list[str], first: int, count: int, seconds: float, results: dict[str, Result]) -> tuple[int, int]:
    """Add what one child does to ``results``; how many targets it finished, and the number of the input it died of."""
    with tempfile.TemporaryDirectory(prefix="hqqtensor-fuzz-", dir=IN_MEMORY) as folder:
        progress, out, errors = (Path(folder, part) for part in ("progress", "out", "errors"))
        progress.write_bytes(PROGRESS.pack(0, first))
        numbers = map(str, (first, count, seconds, progress, folder))
        command = [sys.executable, "-m", "fuzz.child", ",".join(names), *numbers]
        with open(out, "wb") as stdout, open(errors, "wb") as stderr:
            child = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=Path(__file__).parents[1])
            stuck = _wait(child, progress)
        done, reached = PROGRESS.unpack(progress.read_bytes())
        for line in (json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")):
            result = results[line["target"]]
            if "number" in line:
                result.findings[line["number"]] = line["text"]
            else:
                result.taken += line["taken"]
                result.refused += line["refused"]
        if child.returncode == 0:
            return len(names), reached
        tail = errors.read_text(errors="replace")[-2000:]
        results[names[done]].findings[reached] = f"{tail}\n{_death(child.returncode, stuck)}"
        return done, reached


def _wait(child: subprocess.Popen[bytes], progress: Path) -> bool:
    """Wait until the child ends; True where it had to be ended, as no input was finished for long."""
    before, waited = b"", 0.0
    while True:
        try:
            child.wait(0.5)
            return False
        except subprocess.TimeoutExpired:
            now = progress.read_bytes()
            # One that runs, or would if a busy machine let it, is bounded by its processor time.
            stands = _state(child.pid) not in ("T", "R")
            waited = 0.0 if now != before else waited + 0.5 * stands
            before = now
            if waited > STUCK + 60:  # the first input waits for imports
                child.kill()
                child.wait()
                return True


def _state(pid: int) -> str:
    """The kernel's letter for what a process does; "T": stopped by a signal, "R": runs, or waits for a processor."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def _death(code: int, stuck: bool) -> str:
    if stuck:
        return f"finished nothing for {STUCK:.0f} s and was ended"
    if code == -27:
        return f"took more than {CPU_SECONDS:.0f} s of processor time"
    return f"the process ended with {code}"


def save_findings(name: str, findings: dict[int, str], folder: Path) -> Iterator[Path]:
    """Write each finding into a folder: what happened, and the input where it is made of files."""
    from fuzz.child import make_case, write_files
    from fuzz.targets import TARGETS

    for number, text in findings.items():
        place = folder / name / str(number)
        place.mkdir(parents=True, exist_ok=True)
        write_files(make_case(TARGETS[name], number), place)
        (place / "what-happened.txt").write_text(text, encoding="utf-8", errors="replace")
        yield place
