"""A few seconds of the fuzzer with the same inputs every time; `make fuzz` goes on with others."""

import contextlib
import mmap
from pathlib import Path

import pytest

from fuzz import run
from fuzz.child import PEAK, make_case, run_one, write_files
from fuzz.run import run_targets
from fuzz.target import Target, Wrong
from fuzz.targets import TARGETS

COUNT = 200
FINDINGS = Path(__file__).parent / "findings"


@pytest.mark.slow
def test_damaged_inputs_are_refused_or_read_right() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("zstandard")
    pytest.importorskip("triton")
    results = run_targets(list(TARGETS), 0, COUNT, seconds=1.0)
    assert {name: result.findings for name, result in results.items() if result.findings} == {}
    for name, result in results.items():
        assert result.inputs > 10, name
        assert result.taken, f"{name}: no input was taken; its damages are too coarse to test more than the first check"
        assert result.refused or name == "autotune", name


@pytest.mark.parametrize("folder", sorted(FINDINGS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_findings_stay_mended(folder: Path, tmp_path: Path) -> None:
    """Files that once ended in anything but a right answer or a documented error."""
    target = TARGETS[folder.parent.name]
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_files(files, tmp_path)
    with contextlib.suppress(*target.refusals):
        target.run(files, tmp_path)


def test_an_input_is_the_same_in_every_process() -> None:
    assert all(make_case(TARGETS[name], 7) == make_case(TARGETS[name], 7) for name in ("checkpoint", "gguf", "stream"))


@pytest.mark.parametrize(("error", "kind"), [(ValueError, "refused"), (Wrong, "finding"), (IndexError, "finding")])
def test_only_documented_errors_count_as_refusals(error: type[Exception], kind: str, tmp_path: Path) -> None:
    def fail(case: object, folder: Path) -> None:
        raise error("x")

    assert run_one(Target("t", lambda rng: 5, fail, (ValueError,)), 0, tmp_path / "case")[0] == kind


def test_memory_beyond_twice_the_files_and_a_constant_is_a_failure(tmp_path: Path) -> None:
    def take(count: int) -> None:
        with mmap.mmap(-1, count) as memory:  # never memory that the process had before
            memory[::4096] = b"x" * len(range(0, count, 4096))

    def taking(count: int) -> Target:
        return Target("t", lambda rng: {"a": b"x" * 100}, lambda case, folder: take(count), (ValueError,))

    assert run_one(taking(PEAK // 2), 0, tmp_path / "case") == ("taken", "")
    kind, text = run_one(taking(PEAK + (4 << 20)), 0, tmp_path / "case")
    assert kind == "finding" and "an input of 100 bytes took" in text


def test_processes_share_the_inputs_of_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def run_range(names: list[str], first: int, count: int, seconds: float) -> dict[str, run.Result]:
        asked.append((first, count))
        return {"t": run.Result(taken=count, findings={first: "x"})}

    monkeypatch.setattr(run, "run_targets", run_range)
    result = run.run_in_parallel("t", 100, 7, 1.0, jobs=2)
    assert sorted(asked) == [(100, 4), (104, 3)]
    assert result.taken == 7 and result.findings == {100: "x", 104: "x"}


CHILD = """
import sys, types

torch = sys.modules["torch"] = types.ModuleType("torch")  # which takes seconds to import, and is not needed here
torch.set_num_threads = lambda number: None
torch.default_generator = types.SimpleNamespace(manual_seed=lambda number: None)
targets = sys.modules["fuzz.targets"] = types.ModuleType("fuzz.targets")
inputs = iter([0, 0, 1, 2, 3])  # the first is run twice

def run(case, folder):
    if next(inputs) == 2:
        WHAT

targets.TARGETS = {"t": types.SimpleNamespace(name="t", case=lambda rng: None, run=run, refusals=())}
from fuzz import child
child.CPU_SECONDS, child.MEMORY = 0.3, 1 << 28
child.main(["t"], *map(int, sys.argv[2:4]), 60.0, *sys.argv[5:7])
"""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended with -11"),
        ("while True: pass", "processor time"),
        ("bytearray(1 << 29)", "MemoryError"),
    ],
)
def test_a_crash_a_hang_and_hunger_name_their_input(
    what: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("WHAT", what))
    popen = run.subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **rest: popen([command[0], str(script), *command[3:]], **rest)
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (result,) = run_targets(["t"], 0, 3, 60.0).values()
    assert list(result.findings) == [2] and says in result.findings[2]
