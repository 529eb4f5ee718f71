"""A seeded sample of `python -m faults`: calls of saves that go wrong, and memory that is refused."""

import random
import time
from pathlib import Path

import pytest

from faults.__main__ import run
from faults.course import Growth, Watch
from faults.inject import compiler
from faults.judge import Ended, complaint, state_of

FILES = ["save_model, shards over shards", "convert --overwrite", "pack --overwrite"]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="injecting faults needs a C compiler: gcc, cc or clang")
def test_a_call_that_goes_wrong_leaves_the_old_or_the_new_files() -> None:
    rows = {row["name"]: row for row in run("files", FILES, seed=0, share=0.03)}
    assert {name: row["failures"] for name, row in rows.items() if row["failures"]} == {}
    assert rows.keys() == set(FILES)
    for name, row in rows.items():
        assert row["faults"] and row["old"] + row["absorbed"] + row["new"] == row["faults"], name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hqqtensor convert: cannot write /x/out: No space left\n", ""),
        ("hqqtensor convert: it failed\n", "names no file"),
        ("hqqtensor convert: /a\nand more\n", "2 lines"),
        (
            "Traceback (most recent call last):\n  File\nAttributeError: x\nhqqtensor convert: /x\n",
            "class AttributeError",
        ),
    ],
)
def test_what_a_failed_command_prints_is_judged(text: str, says: str) -> None:
    said = complaint(Ended(1, "", text))
    assert says in said if says else not said
    assert "as if it were done" in complaint(Ended(1, "wrote it\n", text))


def test_a_state_is_what_a_loader_reads(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", ".model.safetensors.hqqtensor-abc"):
        (tmp_path / name).write_bytes(b"x")
    state, strays = state_of(tmp_path)
    assert set(state) == {"model.safetensors"} and len(strays) == 2


@pytest.mark.parametrize(("growth", "is_told"), [(0.0, False), (5.0, True)])
def test_growth_is_told_from_noise(growth: float, is_told: bool) -> None:
    noise = random.Random(0)
    seconds = [float(second) for second in range(600)]
    samples = [growth * second + noise.gauss(0, 50) for second in seconds]
    fitted = Growth.of(seconds, samples)
    assert fitted.is_real(100.0) is is_told and not fitted.is_real(1e9)
    assert fitted.first == samples[150] and fitted.last == samples[-1] and abs(fitted.slope / 3600 - growth) < 0.1


def test_too_few_samples_tell_nothing() -> None:
    assert not Growth.of([0.0, 1.0, 2.0], [0.0, 1e9, 2e9]).is_real(0.0)


class Clock:
    """In the place of ``time``; ``stopped``: seconds by which every sleep is longer than it was to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.stopped = 100.0, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.stopped


def test_a_thread_that_stands_still_is_named_and_one_that_goes_on_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    watch = Watch(20.0)
    watch.begins("idle")
    for said in ([], [], ["idle: finished nothing for 20 s"]):
        watch.begins("busy")
        assert watch.sleep(8.0) == said


def test_seconds_in_which_everything_was_stopped_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), Watch(20.0)
    watch.begins("generate")
    clock.stopped = 60.0
    assert watch.sleep(1.0) == []
    clock.stopped = 0.0
    assert watch.sleep(18.0) == [] and watch.sleep(4.0) == ["generate: finished nothing for 20 s"]
