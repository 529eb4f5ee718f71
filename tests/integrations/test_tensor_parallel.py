"""transformers' tensor parallel, ``DistributedConfig(tp_size=...)``, with quantized weights on two processes."""

from pathlib import Path

import pytest
from ranks import run_checks


@pytest.mark.slow
def test_a_quantized_model_is_distributed_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKS", str(tmp_path))
    names = ["a_quantized_directory_is_loaded_in_shards", "quantizing_while_distributing_is_refused"]
    assert run_checks("parallel_checks", Path(__file__).parent, names, 2, tmp_path) == {name: [] for name in names}
