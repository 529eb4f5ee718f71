import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

DOCLM = Path(__file__).parent.parent / "assets" / "doclm"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with doclm's tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    vocabulary = json.loads((DOCLM / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DOCLM / name, path / name)
    return path
