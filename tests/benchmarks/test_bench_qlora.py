"""The benchmark of adapters keeps each row and goes on after those that are there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import qlora, qlora_models
from benchmarks.qlora_models import CALIBRATION, HELD_OUT, adapted, text_of
from hqqtensor import HqqConfig

pytest.importorskip("peft")


def result(row: str, after: float) -> dict[str, Any]:
    return {
        "row": row, "model": "doclm", "steps": 1, "rank": 4, "before": 4.0, "after": after, "step_seconds": 0.5,
        "weight_bytes": 10**6, "peak_bytes": 2 * 10**6, "added_bytes": 10**6, "prepared_seconds": 1.0,
    }  # fmt: skip


def test_a_row_is_measured_and_has_what_the_table_shows() -> None:
    row = qlora.measure("2+seen", "doclm", 0, 4, 1)
    assert row.keys() == result("2", 1.0).keys() and 3 < row["before"] == row["after"] < 4
    assert 9e6 < row["weight_bytes"] < 11e6


def test_a_calibrated_base_is_the_default_one_on_the_calibration_text(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(qlora_models, "quantize_", lambda _model, *args, **kwargs: calls.append((args, kwargs)))
    text = text_of("doclm", 256)
    adapted("3+default+calibrated", "doclm", 4, text)
    [((config,), settings)] = calls
    assert config == HqqConfig(3)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in settings["calibration"]]), text.calibration)


def test_rows_with_a_file_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"dense": 3.0, "4": 3.01, "2": 3.2, "2+seen": 3.05}
    for row, after in losses.items():
        (tmp_path / f"doclm-1-steps-rank-4-2-windows-{row}.json").write_text(json.dumps(result(row, after)))
    qlora.main(
        ["--steps", "1", "--ranks", "4", "--test-windows", "2", "--rows", ",".join(losses), "--results", str(tmp_path)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "| 4 | 1.0 MB | 4.0000 | 3.0100 | +0.33 % |  | 2 MB | 0.50 s |" in lines
    assert "| 2+seen | 1.0 MB | 4.0000 | 3.0500 | +1.67 % | 75 % | 2 MB | 0.50 s |" in lines


@pytest.mark.parametrize("rows", ["5", "2+other", "dense+seen"])
def test_unknown_rows_are_refused(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        qlora.main(["--rows", rows])
    assert f"--rows: {rows}" in capsys.readouterr().err


def test_no_window_is_in_two_parts_of_the_text() -> None:
    parts = text_of("doclm", 256)
    assert len(parts.held_out) == HELD_OUT and len(parts.calibration) == CALIBRATION and len(parts.train) > 100
    windows = [tuple(window.tolist()) for part in parts for window in part]
    assert len(set(windows)) == len(windows)
