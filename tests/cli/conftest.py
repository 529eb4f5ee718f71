import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from hqqtensor.cli import main

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


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template of the simplest kind."""


@pytest.fixture(scope="session")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``dense``, ``tiny`` as a chat model with 256 positions, and ``packed``, the same in 4 bits."""
    root = tmp_path_factory.mktemp("small")
    shutil.copytree(tiny, root / "dense")
    config = json.loads((root / "dense" / "config.json").read_text())
    (root / "dense" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    (root / "dense" / "chat_template.jinja").write_text(TEMPLATE)
    assert main(["quantize", str(root / "dense"), str(root / "packed"), "--json"]) == 0
    return root
