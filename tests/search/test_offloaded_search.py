"""A search measures the same on a model whose blocks lie on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hqqtensor.calibration import calibrate
from hqqtensor.cli import model_dir
from hqqtensor.search import EMBEDDINGS, measure_sensitivity
from hqqtensor.streaming import Source, offloaded

CANDIDATES: tuple[dict[str, Any], ...] = ({"nbits": 3, "group_size": 32}, {"nbits": 4, "group_size": 32}, EMBEDDINGS[0])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("search") / "dense"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("measured_on", ["weights", "outputs", "calibration"])
def test_sensitivities_are_those_of_the_model_in_memory(dense: Path, limit: int, measured_on: str) -> None:
    batches = [{"input_ids": torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))}]

    def measure(model: Any, **options: Any) -> Any:
        calibration = calibrate(model, batches) if measured_on == "calibration" else None
        on = batches if measured_on == "outputs" else None
        return measure_sensitivity(model, None, on, CANDIDATES, calibration=calibration, **options)

    want = measure(model_dir.open_dense(dense))
    empty, source = model_dir.empty_model_of(dense, torch.bfloat16), Source(dense)
    with offloaded(empty, source) as blocks, blocks.keeping(limit):
        got = measure(empty, offloaded=blocks)
    source.close()
    assert got == want
    assert all(p.is_meta for p in empty.parameters())
