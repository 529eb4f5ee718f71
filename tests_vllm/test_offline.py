"""vLLM on directories as hqqtensor writes them: the same greedy tokens as transformers' ``generate`` in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import PROMPTS, llama, of_transformers, of_vllm, qwen3_moe

import hqqtensor
from hqqtensor import HqqConfig

JOINED = {"q_proj": {"nbits": 3}, "k_proj": {"nbits": 8, "group_size": 32}, "gate_proj": None, "v_proj": {"axis": 0}}
SETTINGS = {
    "recommended": HqqConfig(4, embedding_nbits=8),
    "1 bit": HqqConfig(1, 32),
    "2 bits, quantized scales": HqqConfig(2, 16, quant_scale=True, quant_zero=True, meta_nbits=4),
    "3 bits": HqqConfig(3, 64, embedding_nbits=6),
    "5 bits, axis 0": HqqConfig(5, 64, axis=0),
    "6 bits, axis 0, quantized scales": HqqConfig(6, 32, axis=0, quant_scale=True, quant_zero=True, meta_nbits=8),
    "7 bits, float32 scales": HqqConfig(7, 64, scale_dtype=torch.float32),
    "8 bits, a group a row": HqqConfig(8, None),
    "fp4": HqqConfig(4, 32, format="fp4"),
    "fp6": HqqConfig(6, 32, format="fp6"),
    "fp8": HqqConfig(8, 32, format="fp8"),
    "nf4": HqqConfig(4, 64, format="nf4"),
    "codebook": HqqConfig(3, 64, format="codebook", codebook="row"),
    "rotation": HqqConfig(4, 64, rotation=True),
    "joined layers of unlike settings": HqqConfig(4, 64, dynamic_config=JOINED),
}


def save(model: Any, path: Path, config: HqqConfig | None) -> Path:
    if config is not None:
        hqqtensor.quantize_(model, config)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_weight(name: str, tmp_path: Path) -> None:
    directory = save(llama(), tmp_path / "model", SETTINGS[name])
    assert of_vllm(directory) == of_transformers(directory)


def test_a_tied_embedding(tmp_path: Path) -> None:
    directory = save(llama(tie_word_embeddings=True), tmp_path / "model", HqqConfig(4, embedding_nbits=8))
    assert of_vllm(directory) == of_transformers(directory)


@pytest.mark.parametrize("config", [HqqConfig(4, 32), HqqConfig(3), HqqConfig(4, 64, dynamic_config={"experts": None})])
def test_experts(config: HqqConfig, tmp_path: Path) -> None:
    directory = save(qwen3_moe(), tmp_path / "model", config)
    assert of_vllm(directory) == of_transformers(directory)


@pytest.mark.parametrize("settings", [None, {"nbits": 3, "group_size": 64, "dynamic_config": {"v_proj": {"nbits": 8}}}])
def test_a_dense_directory_is_quantized_while_it_loads(settings: dict[str, Any] | None, tmp_path: Path) -> None:
    directory = save(llama(), tmp_path / "dense", None)
    config = HqqConfig(4, embedding_nbits=8) if settings is None else HqqConfig(**settings)
    stored = save(llama(), tmp_path / "quantized", config)
    overrides = None if settings is None else {"quantization_config": {"quant_method": "hqqtensor", **settings}}
    options = {} if overrides is None else {"hf_overrides": overrides}
    assert of_vllm(directory, quantization="hqqtensor", **options) == of_transformers(stored)


def test_dense_experts_are_quantized_while_they_load(tmp_path: Path) -> None:
    directory = save(qwen3_moe(), tmp_path / "dense", None)
    stored = save(qwen3_moe(), tmp_path / "quantized", HqqConfig(4, embedding_nbits=8))
    assert of_vllm(directory, quantization="hqqtensor") == of_transformers(stored)


def test_an_adapter_on_top(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    directory = save(llama(), tmp_path / "model", HqqConfig(4, 64))
    base = hqqtensor.load(directory, dtype=torch.float32)
    plain = of_transformers(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    want = of_transformers(model)
    assert want != plain
    assert of_vllm(directory, lora=tmp_path / "adapter") == want


def test_the_same_tokens_with_torch_compile(tmp_path: Path) -> None:
    directory = save(llama(), tmp_path / "model", SETTINGS["joined layers of unlike settings"])
    assert len(of_vllm(directory, enforce_eager=False)) == len(PROMPTS)
    assert of_vllm(directory, enforce_eager=False) == of_transformers(directory)
