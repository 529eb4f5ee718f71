"""Counts of several runs of the fuzzer in one file."""

from pathlib import Path

from fuzz import tally


def test_counts_of_runs_add_up_by_target(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tally.json"
    tally.add(file, "gguf", 1500, 30, 0)
    tally.add(file, "awq", 7, 1, 0)
    tally.add(file, "gguf", 500, 3, 2)
    assert tally.table(file).splitlines()[2:] == [
        "| awq | 7 | 1 | 0 |",
        "| gguf | 2,000 | 33 | 2 |",
        "| together | 2,007 | 34 | 2 |",
    ]
