"""The process that has the library of ``preload.c``: forks a child for each fault, and judges what it leaves.

``python -m faults.inside KIND OUT SEED SHARE NAME...`` writes rows of the table as JSON to OUT. KIND: "files" or
"memory". SHARE: of all faults, chosen by SEED. NAME: of scenarios; none for all.
"""

import contextlib
import gc
import io
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from faults.inject import COUNT, FILE_FAULTS, Fault, Injector
from faults.judge import Ended, State, canonical, complaint, state_of
from faults.rows import Row, in_child, row_of


class FileRun:
    """One scenario with all of its faults."""

    def __init__(self, scenario: "object", injector: Injector, folder: Path) -> None:
        from faults.scenarios import Scenario

        assert isinstance(scenario, Scenario)
        self.scenario, self.injector = scenario, injector
        self.template, self.root, self.log = folder / "template", folder / "root", folder / "log"
        self._warm_up(folder / "warm")
        shutil.rmtree(self.template, ignore_errors=True)
        self.template.mkdir(parents=True)
        ended = in_child(lambda: scenario.prepare(self.template) or 0, self.log)
        assert ended.code == 0, ended.stderr
        # What is written names the folder, so it is prepared where it is used.
        self.old, _ = state_of(self.template / scenario.target)
        self.names = {path.name for path in self.template.iterdir()} | {scenario.target.partition("/")[0]}
        self.names -= set(scenario.stays)
        self.row = Row(scenario.name)
        ended = self._run(COUNT, 1)
        assert ended.code == 0, ended.stderr
        self.calls = injector.log
        self.row.calls = len(self.calls)
        self.new = canonical(self._state())
        assert not self._strays(), self._strays()

    def _warm_up(self, folder: Path) -> None:
        """Do the work once in this process, so that its children need not import all that it uses."""
        folder.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.scenario.prepare(folder)
            self.scenario.run(folder)
        shutil.rmtree(folder)
        gc.collect()
        gc.freeze()

    def faults(self) -> list[tuple[Fault, int]]:
        """Every fault at every call that it is about."""
        return [
            (fault, at + 1) for fault in FILE_FAULTS for at in range(sum(op in fault.ops for op in self.calls))
        ]  # fmt: skip

    def inject(self, fault: Fault, at: int) -> None:
        """One run in which it happens; adds what came of it."""
        ended = self._run(fault, at)
        if not self.injector.hits:  # threads: fewer calls this time
            return
        self.row.faults += 1
        problem = self._judge(fault, ended)
        if problem:
            calls = [op for op in self.injector.log if op in fault.ops]
            where = calls[at - 1] if at <= len(calls) else "?"
            self.row.failures.append(f"{fault.name} at call {at} ({where}): {problem}")

    def _judge(self, fault: Fault, ended: Ended) -> str:
        if fault.kills:
            if ended.code != -signal.SIGKILL:
                return f"ended with {ended.code}: {ended.stderr[-300:]}"
        elif ended.code == 0:
            self.row.absorbed += 1
            if canonical(self._state()) != self.new:
                return "said it was done, and the new state is not there"
            return self._go_on() if self._strays() else ""
        elif ended.code < 0 or ended.code == 70:
            return f"ended with {ended.code}: {ended.stderr.partition('Extension modules')[0][-1500:]}"
        elif problem := complaint(ended):
            return problem
        is_dead = fault.kills or (fault.stays and fault.name.startswith("errors"))
        state = self._state()
        if is_dead and not self._is_whole(state):
            self.scenario.look(self.root)
            state = self._state()
            self.row.put_back += 1
        if not self._is_whole(state):
            return f"neither the old nor the new state: {self._difference(state)}"
        is_new = canonical(state) == self.new
        self.row.new += is_new
        self.row.old += not is_new
        strays = self._strays()
        if not (is_dead or fault.interrupts or "unlink" in fault.ops) and strays - set(self.scenario.stays):
            return f"left {sorted(strays)}"
        return self._go_on() if fault.kills or strays else ""

    def _go_on(self) -> str:
        """Give the same call again; what is wrong afterwards."""
        self.row.continued += 1
        ended = self._run(COUNT, 1, anew=False)
        if ended.code != 0:
            return f"the same call, given again, fails: {ended.stderr[-500:]}"
        if canonical(self._state()) != self.new:
            return f"the same call, given again, leaves something else: {self._difference(self._state())}"
        strays = self._strays()
        return f"the same call, given again, leaves {sorted(strays)}" if strays else ""

    def _run(self, fault: Fault, at: int, anew: bool = True) -> Ended:
        if anew:
            shutil.rmtree(self.root, ignore_errors=True)
            shutil.copytree(self.template, self.root)
        self.injector.set(fault, at, self.root)

        def work() -> int:
            self.injector.arm()
            try:
                return self.scenario.run(self.root)
            finally:
                self.injector.disarm()

        return in_child(work, self.log)

    def _state(self) -> State:
        return state_of(self.root / self.scenario.target)[0]

    def _is_whole(self, state: State) -> bool:
        return state == self.old or canonical(state) == self.new

    def _difference(self, state: State) -> str:
        """The names of files that are not those of the old state, and of the new one."""
        texts = []
        for name, side in (("old", canonical(self.old)), ("new", self.new)):
            now = canonical(state)
            texts.append(f"not {name}: {sorted(n for n in {*now, *side} if now.get(n) != side.get(n))}")
        return "; ".join(texts)

    def _strays(self) -> set[str]:
        beside = {path.name for path in self.root.iterdir()} - self.names
        return beside | state_of(self.root / self.scenario.target)[1]


def run_files(names: list[str], seed: int, share: float, folder: Path) -> list[Row]:
    """Every scenario with its faults."""
    import torch

    from faults.scenarios import scenarios

    torch.set_num_threads(1)
    chosen = [scenario for scenario in scenarios() if not names or scenario.name in names]
    injector = Injector()
    return [row_of(partial(FileRun, scenario, injector, folder), seed, share) for scenario in chosen]


def main(kind: str, out: str, seed: str, share: str, *names: str) -> None:
    with tempfile.TemporaryDirectory(prefix="hqqtensor-faults-") as folder:
        if kind == "files":
            rows = run_files(list(names), int(seed), float(share), Path(folder))
        else:
            from faults.memory import run_memory

            rows = run_memory(list(names), int(seed), float(share), Path(folder))
    Path(out).write_text(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
