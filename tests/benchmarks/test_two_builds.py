from pathlib import Path

import pytest

from benchmarks import two_builds

ROOT = str(Path(__file__).resolve().parents[2])


def test_a_build_compared_with_itself_gives_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "64x256", "--tokens", "1", "--bits", "4", "--rounds", "1", "--quick"]
    rows = two_builds.main(["--before", ROOT, *arguments, "--limit", "1000"])
    assert {"4-bit fp32", "4-bit int8 bf16", "nf4 bf16"} <= {row["name"] for row in rows}
    assert all(row["same"] and row["ratio"] > 0 for row in rows)
    assert f"{len(rows)} rows" in capsys.readouterr().out
