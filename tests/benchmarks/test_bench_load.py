"""The benchmark of loading writes a model that loads, and gives figures that can be."""

import json
from pathlib import Path

import pytest

from benchmarks import load


def test_a_small_model_is_written_loaded_by_two_processes_and_removed(tmp_path: Path, capsys) -> None:
    load.main(["--small", "--rounds", "1", "--folder", str(tmp_path)])
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["load"] < 60 and result["weights"] > 1e6
    assert 0 < result["second_private"] < result["first_resident"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.DISK, "small", 1 << 60)
    monkeypatch.setattr(load, "write_model", None)
    with pytest.raises(SystemExit, match="MiB free; this needs"):
        load.main(["--small", "--folder", str(tmp_path)])
