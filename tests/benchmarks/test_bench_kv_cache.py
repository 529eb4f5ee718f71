"""benchmarks.kv_cache on a tiny setting: rows, errors, verdict; a cache that returns wrong states is caught."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kv_cache
from benchmarks.contender import WrongAnswer
from hqqtensor.integrations.transformers.cache import HqqCacheLayer

TINY = ["--bits", "4", "--head-dims", "64", "--prompts", "192", "--windows", "8", "--layers", "1", "--heads", "1"]


def test_main_writes_a_row_for_each_cache_and_a_verdict_for_each_backend(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    kv_cache.main([*TINY, "--caches", "ours", "hqq", "exact", "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    rows = {row["cache"]: row for row in results["rows"]}
    assert {"ours", "exact"} <= set(rows)
    assert rows["exact"]["key error"] == 0 < rows["ours"]["key error"] < 0.2
    assert all(row["token ms"] > 0 and row["prompt ms"] > 0 for row in rows.values())
    assert len(results["verdict"]) == (4 if "hqq" in rows else 0)


def test_a_cache_with_wrong_states_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HqqCacheLayer.update

    def wrong(self: HqqCacheLayer, *args: Any) -> Any:
        keys, values = right(self, *args)
        return keys, values * 1.3

    monkeypatch.setattr(HqqCacheLayer, "update", wrong)
    with pytest.raises(WrongAnswer, match="ours, 4 bits"):
        kv_cache.main([*TINY, "--caches", "ours"])
