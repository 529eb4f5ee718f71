"""What vLLM's loader is given of a directory of ours, and which settings dense weights get while they load."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_, save_model
from hqqtensor.integrations.vllm import files, register
from hqqtensor.integrations.vllm.settings import default_config, names_of_rows, read_config, settings_for

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(40, 64), "norm": nn.LayerNorm(64), "lm_head": nn.Linear(64, 40, bias=False)}
    )
    model["lm_head"].weight = model["embed"].weight
    return model


def save(path: Path, config: HqqConfig) -> list[str]:
    model = tied()
    quantize_(model, config)
    save_model(model, path, max_shard_size="1KB")
    return sorted(str(file) for file in path.glob("*.safetensors"))


def test_weights_come_whole_and_shared_ones_under_each_name(tmp_path: Path) -> None:
    paths = save(tmp_path, HqqConfig(4, dynamic_config={"embed": {"nbits": 8}}, skip_modules=[]))
    assert len(paths) > 1
    weights = dict(files.stored_weights(paths))
    assert sorted(weights) == ["embed.weight", "lm_head.weight", "norm.bias", "norm.weight"]
    assert isinstance(weights["embed.weight"], HQQTensor) and weights["lm_head.weight"] is weights["embed.weight"]


def test_files_of_others_go_to_vllms_loader(tmp_path: Path) -> None:
    file = str(tmp_path / "model.safetensors")
    save_file({"a.weight": torch.ones(2, 2)}, file)
    calls = []

    def theirs(paths: list[str], tqdm: bool) -> list[tuple[str, torch.Tensor]]:
        calls.append((paths, tqdm))
        return [("a.weight", torch.ones(2, 2))]

    (entry,) = files._reads_ours(theirs)([file], False)
    assert entry[0] == "a.weight" and calls == [([file], False)] and not files.Reading.holds_quantized
    paths = save(tmp_path / "ours", HqqConfig(4, 32, skip_modules=[]))
    assert dict(files._reads_ours(theirs)(paths, False)) and len(calls) == 1 and files.Reading.holds_quantized
    files.Reading.holds_quantized = False


def test_the_fingerprint_tells_settings_apart_not_numbers(tmp_path: Path) -> None:
    first, second = (
        save(tmp_path / name, HqqConfig(4, size, skip_modules=[])) for name, size in (("a", 32), ("b", 64))
    )
    again = save(tmp_path / "c", HqqConfig(4, 32, skip_modules=[], solver="rtn"))
    assert files.fingerprint(first) == files.fingerprint(again) != files.fingerprint(second)


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group = "vllm.general_plugins"
    ((name, value),) = project["entry-points"][group].items()
    assert importlib.metadata.EntryPoint(name, value, group).load() is register


def test_names_of_joined_layers_are_those_of_the_checkpoint() -> None:
    assert names_of_rows("model.layers.0.self_attn.qkv_proj", PACKED, 1) == "model.layers.0.self_attn.k_proj"
    assert names_of_rows("model.layers.0.self_attn.o_proj", PACKED, None) == "model.layers.0.self_attn.o_proj"


def test_dense_weights_get_the_settings_that_quantize_gives() -> None:
    config = read_config({"quant_method": "hqqtensor"})
    assert config == default_config() and config.embedding_nbits == 8
    layer = settings_for(config, "model.layers.0.self_attn.q_proj", 64, False)
    assert layer is not None and (layer.nbits, layer.group_size, layer.solver) == (4, 20, "column_scaled")
    head = settings_for(config, "lm_head", 64, True)
    assert head is not None and head.nbits == 8


def test_tags_and_skipped_modules_hold_while_loading() -> None:
    tags = {"k_proj": {"nbits": 8}, "layers.3": None}
    config = read_config(
        {"nbits": 3, "group_size": 64, "dynamic_config": tags, "skip_modules": ["lm_head", "down_proj"]}
    )

    def bits(name: str, is_embedding: bool = False) -> int | None:
        settings = settings_for(config, name, 64, is_embedding)
        return None if settings is None else settings.nbits

    assert bits("model.layers.0.self_attn.q_proj") == 3 and bits("model.layers.0.self_attn.k_proj") == 8
    assert bits("model.layers.3.self_attn.o_proj") is None and bits("model.layers.0.mlp.down_proj") is None
    assert bits("model.layers.0.mlp.gate") is None
    assert bits("model.embed_tokens", True) is None and bits("lm_head", True) is None


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown HqqConfig options \['bits'\]"):
        read_config({"bits": 4})
