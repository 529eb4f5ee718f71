"""LoRA of peft over quantized weights under DDP, FSDP2, transformers' Trainer and in a pipeline, on two processes."""

from pathlib import Path

import pytest
from ranks import run_checks

pytest.importorskip("peft")
CHECKS = [
    "ddp_trains_adapters_as_one_process_does",
    "ddp_trains_scales_with_the_adapters",
    "fsdp_trains_adapters_as_one_process_does",
    "a_pipeline_of_stages_has_the_gradients_of_one_process",
    "the_trainer_trains_adapters_as_one_process_does",
]


@pytest.mark.slow
def test_adapters_train_on_two_processes_as_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKS", str(tmp_path))
    problems = run_checks("adapter_checks", Path(__file__).parent, CHECKS, 2, tmp_path)
    assert problems == {name: [] for name in CHECKS}
