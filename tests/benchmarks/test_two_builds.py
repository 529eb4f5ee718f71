from pathlib import Path

import pytest

from benchmarks import two_builds

ROOT = str(Path(__file__).resolve().parents[2])


def test_a_build_compared_with_itself_gives_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "64x256", "--tokens", "1", "--bits", "4", "--rounds", "1", "--pairs", "2", "--quick"]
    # Tiny weights would need thousands of copies to fill a cache.
    rows = two_builds.main(["--before", ROOT, *arguments, "--limit", "1000", "--copies-mib", "0.125"])
    assert {"4-bit fp32", "4-bit int8 bf16", "nf4 bf16"} <= {row["name"] for row in rows}
    assert all(row["same"] and 0 < row["smallest"] <= row["ratio"] <= row["largest"] for row in rows)
    assert any(row["smallest"] < row["largest"] for row in rows)  # each pair was timed anew
    assert f"{len(rows)} rows" in capsys.readouterr().out


def test_a_row_is_judged_by_the_median_of_its_pairs() -> None:
    pairs = [{"before ms": 1.0, "after ms": r, "ratio": r, "same": r != 1.5} for r in (1.01, 1.5, 0.9)]
    row = two_builds.summary(("8x8", 1, "4-bit"), pairs)
    assert (row["ratio"], row["smallest"], row["largest"], row["same"]) == (1.01, 0.9, 1.5, False)


def test_no_pairs_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        two_builds.main(["--before", ROOT, "--pairs", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err
