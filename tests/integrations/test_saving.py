"""``save_pretrained`` of a model that ``quantize_`` changed, and what else transformers' models say of themselves."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao
import transformers as tf
from doclm_models import DOCLM, IDS, PLAIN, load, quantized, same
from safetensors import safe_open
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, dequantize_, load_model, quantize_, save_model
from hqqtensor.cli import main

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TAGS = {"embed_tokens": {"nbits": 8}, "q_proj": {"nbits": 3, "quant_scale": True}, "up_proj": {"axis": 0}}


def dense_model(kind: str, path: Path) -> Any:
    torch.manual_seed(0)
    if kind == "doclm":
        return load()
    if kind == "gpt2":  # transposed weights
        config: Any = tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    elif kind == "mixtral":  # experts that lie one by one in the file, and in one weight in memory
        config = tf.MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SIZES)
    else:
        config = tf.LlamaConfig(tie_word_embeddings=kind == "tied", **SIZES)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(path / "dense")
    return load(path / "dense")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("doclm", HqqConfig(4, 64)),
        ("gpt2", HqqConfig(4, 32)),
        ("mixtral", HqqConfig(4, 32)),
        ("tied", HqqConfig(8, 64, dynamic_config={"embed_tokens": {"nbits": 8}}, skip_modules=[])),
        ("llama", HqqConfig(5, 32, dynamic_config=TAGS, skip_modules=["down_proj"])),
        ("llama", HqqConfig(4, 16, format="codebook", codebook="row", rotation=True)),
    ],
)
def test_what_quantize_changed_is_saved_and_loaded_bit_for_bit(kind: str, config: HqqConfig, tmp_path: Path) -> None:
    model = dense_model(kind, tmp_path)
    quantize_(model, config)
    want = model(IDS).logits
    for options in ({}, {"max_shard_size": "20KB"}):
        model.save_pretrained(tmp_path / "q", **options)
        again = load(tmp_path / "q")
        assert same(model, again) and torch.equal(again(IDS).logits, want) and quantized(again) == quantized(model)
        entry = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert (entry["quant_method"], entry["nbits"], entry["group_size"]) == (
            "hqqtensor", config.nbits, config.group_size,
        )  # fmt: skip


def test_the_model_itself_is_as_it_was_before_saving(tmp_path: Path) -> None:
    model = load()
    quantize_(model, HqqConfig(4, 64))
    attributes, settings = dict(vars(model)), copy.deepcopy(vars(model.config))
    with pytest.raises(OSError):
        model.save_pretrained("/proc/no/such/folder")
    model.save_pretrained(tmp_path)
    assert vars(model) == attributes and not hasattr(model.config, "quantization_config")
    assert vars(model.config) == {**settings, "dtype": model.config.dtype, "architectures": model.config.architectures}
    assert model.half().model.layers[0].mlp.up_proj.weight.dtype == torch.float16


def test_weights_that_came_otherwise_are_saved_too(tmp_path: Path) -> None:
    model = load()
    torchao.quantization.quantize_(model.model.layers, HqqConfig(3, 64))
    assert len(quantized(model)) == 35
    model.save_pretrained(tmp_path / "torchao")
    assert same(model, load(tmp_path / "torchao"))
    other = load()
    load_model(other, tmp_path / "torchao")
    other.model.save_pretrained(tmp_path / "base")  # a part of a model
    assert same(tf.AutoModel.from_pretrained(tmp_path / "base"), model.model)


@pytest.mark.parametrize("by", ["dequantize_", "dequantize"])
def test_a_model_that_is_dense_again_is_saved_as_one(by: str, tmp_path: Path) -> None:
    model = load(quantization_config=HqqConfig(4, 64))
    if by == "dequantize_":
        dequantize_(model)
    else:
        model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(load(tmp_path), model)


def test_the_memory_footprint_is_that_of_the_packed_weights() -> None:
    model = load()
    dense = model.get_memory_footprint()
    assert dense == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    quantize_(model, HqqConfig(4, 64))
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert buffers > 0 and model.get_memory_footprint() == weights + buffers < dense
    assert model.get_memory_footprint(return_buffers=False) == weights
    packed = sum(p.nbytes for p in model.parameters() if isinstance(p, HQQTensor))
    numbers = sum(p.numel() for p in model.parameters() if isinstance(p, HQQTensor))
    assert packed == numbers * 4.5 / 8


def keys_of(directory: Path) -> set[str]:
    keys: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            keys |= set(f.keys())
    return keys


@pytest.mark.parametrize("kind", ["from_pretrained", "quantize_"])
def test_adapters_of_transformers_itself_are_saved_alone(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(**({"quantization_config": HqqConfig(4, 64)} if kind == "from_pretrained" else {}))
    if kind == "quantize_":
        quantize_(model, HqqConfig(4, 64))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert len(keys_of(tmp_path)) == 10 and all("lora_" in key for key in keys_of(tmp_path))
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    again = load(quantization_config=HqqConfig(4, 64))
    again.load_adapter(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


# Buffers that are not persistent, such as inv_freq, are computed when a model is built and belong in no file.


def test_buffers_that_are_not_persistent_are_not_saved(tmp_path: Path) -> None:
    model = load(quantization_config=HqqConfig(4, 64))
    assert "model.rotary_emb.inv_freq" in dict(model.named_buffers())
    model.save_pretrained(tmp_path / "saved")
    assert main(["quantize", DOCLM, str(tmp_path / "quantized"), *PLAIN, "--json"]) == 0
    for directory in ("saved", "quantized"):
        assert not [key for key in keys_of(tmp_path / directory) if "inv_freq" in key]
        assert same(load(tmp_path / directory), model)


@pytest.mark.parametrize("written_by", ["cli", "hqq"])
def test_a_model_on_the_meta_device_gets_its_buffers_by_computing_them(written_by: str, tmp_path: Path) -> None:
    assert main(["quantize", DOCLM, str(tmp_path / "cli"), *PLAIN, "--json"]) == 0
    assert main(["convert", str(tmp_path / "cli"), str(tmp_path / "hqq"), "--to", "hqq", "--json"]) == 0
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(DOCLM), dtype=torch.bfloat16)
    load_model(model, tmp_path / written_by)
    want = load(tmp_path / "cli")
    for name, buffer in want.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    assert torch.equal(model.eval()(IDS).logits, want(IDS).logits)


def test_buffers_that_nobody_can_compute_are_warned_of(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("table", torch.ones(3), persistent=False)

    model = Model()
    for stored in (False, True):
        save_model(model, tmp_path, non_persistent_buffers=stored)
        with torch.device("meta"):
            empty = Model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_model(empty, tmp_path)
        text = [str(w.message) for w in caught]
        if stored:
            assert text == [] and torch.equal(empty.table, model.table)
        else:
            assert len(text) == 1 and "table is still on the meta device" in text[0] and "include_buffers" in text[0]
        assert torch.equal(empty.layer.weight, model.layer.weight)
