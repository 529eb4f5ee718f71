from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hqqtensor import quantize_, save_model
from hqqtensor.cli import model_dir
from hqqtensor.cli.arguments import make_parser
from hqqtensor.cli.quantize import make_config, skip_output_layer


@pytest.fixture(scope="session")
def llama_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, llama_config: Any) -> Path:
    """A random Llama with a tied embedding in bfloat16, in four shards."""
    path = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config).to(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) >= 3
    return path


Opened = Callable[..., None]


@pytest.fixture(scope="session")
def quantize_whole() -> Opened:
    """``hqqtensor quantize`` as it would be for the model opened whole: what streaming must equal."""

    def run(source: Path, out: Path, *options: object) -> None:
        args = make_parser().parse_args(["quantize", str(source), str(out), *map(str, options)])
        config = skip_output_layer(model_dir.empty_model_of(source), make_config(args), args)
        model = model_dir.open_dense(source)
        quantize_(model, config)
        save_model(model, out, max_shard_size=args.max_shard_size, non_persistent_buffers=False)
        settings = model_dir.read_dense_config(source)
        model_dir.complete(out, source, settings, config, next(model.parameters()).dtype)

    return run
