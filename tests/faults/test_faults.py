"""A seeded sample of `python -m faults`: calls of saves that go wrong, and memory that is refused."""

import random
from pathlib import Path

import pytest

from faults.__main__ import run
from faults.inject import compiler
from faults.judge import Ended, complaint, state_of
from faults.soak import slope

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
    gradient, error = slope(seconds, [growth * second + noise.gauss(0, 50) for second in seconds])
    assert (gradient > 3 * error) is is_told
