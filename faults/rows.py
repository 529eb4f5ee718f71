"""A row of the table, and the child processes whose ends it counts."""

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from faults.inject import Fault
from faults.judge import Ended

PATIENCE = 120.0
"""Seconds after which a child hangs; a hundred times what it takes."""


@dataclass
class Row:
    """Counts of one scenario.

    absorbed: runs that did their work nonetheless. old, new: what was whole after the others.
    put_back: between two renames there was no target, and the next command put the old one back. continued: runs in
    which the same call went on, or removed what had been left. failures: what must not happen.
    """

    name: str
    calls: int = 0
    faults: int = 0
    absorbed: int = 0
    old: int = 0
    new: int = 0
    put_back: int = 0
    continued: int = 0
    failures: list[str] = field(default_factory=list)

    def line(self, seconds: float) -> str:
        """The row, and the first failures, for people who wait."""
        first = "".join(f"\n    {failure}" for failure in self.failures[:5])
        counts = f"{self.calls} calls, {self.faults} faults, {len(self.failures)} failures"
        return f"{self.name}: {counts}, {seconds:.0f} s{first}"


def in_child(work: Callable[[], int], log: Path) -> Ended:
    """Fork, do ``work`` with its output in a file, and wait."""
    out, errors = log.with_suffix(".out"), log.with_suffix(".err")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for number, file in ((1, out), (2, errors)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ["HQQTENSOR_TRACEBACK"] = "1"
            faulthandler.enable(2, all_threads=False)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    before = time.monotonic()
    waited, pause = 0.0, 0.002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), out.read_text(), errors.read_text())
        # Seconds in which this process was stopped from outside, its child most likely with it, do not count.
        waited += min(time.monotonic() - before, 1.0)
        before = time.monotonic()
        if waited > PATIENCE:
            os.kill(pid, signal.SIGABRT)
            os.waitpid(pid, 0)
            return Ended(-signal.SIGABRT, "", "hangs")
        time.sleep(pause)


class Run(Protocol):
    """One scenario with all of its faults."""

    row: Row

    def faults(self) -> list[tuple[Fault, int]]:
        """Every fault, and the number of the call at which it happens."""

    def inject(self, fault: Fault, at: int) -> None:
        """One run in which it happens; adds what came of it to ``row``."""


def row_of(make: Callable[[], Run], seed: int, share: float) -> Row:
    """The row of the run that ``make`` makes, after a share of its faults: the same for the same seed, all for 1."""
    started = time.monotonic()
    run = make()
    faults = run.faults()
    if share < 1 and faults:
        faults = random.Random(f"{seed} {run.row.name}").sample(faults, max(1, round(share * len(faults))))
    for fault, at in faults:
        run.inject(fault, at)
    print(run.row.line(time.monotonic() - started), file=sys.stderr, flush=True)
    return run.row
