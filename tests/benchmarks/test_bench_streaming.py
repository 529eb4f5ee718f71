"""The benchmark of streaming, scaled down."""

from pathlib import Path

import pytest

from benchmarks import streaming


def test_it_measures_memory_and_speed_and_cleans_up(tmp_path: Path) -> None:
    figures = streaming.measure(small=True, processes=1, place=tmp_path)
    assert figures["weights"] == 4_188_416 and figures["million_weights_per_second"] > 0
    assert figures["disk_million_weights_per_second"] > 0
    # Most of it is what the imports take. The 7B-shaped run may have 2 GiB.
    assert 0 < figures["peak_anonymous_mib"] < 1024
    assert list(tmp_path.iterdir()) == []


def test_it_says_that_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = streaming.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="GB of disk are needed"):
        streaming.measure(small=True, processes=1, place=tmp_path)
    assert list(tmp_path.iterdir()) == []
