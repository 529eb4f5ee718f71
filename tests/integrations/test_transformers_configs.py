import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao
import transformers
from doclm_models import IDS, load, quantized, same
from torch import nn
from torchao.quantization import FqnToConfig

from hqqtensor import HqqConfig
from hqqtensor.integrations.transformers import config as bridge

# transformers' own HqqConfig


@pytest.mark.usefixtures("serves_hqq")
@pytest.mark.parametrize("installed", [True, False])
def test_transformers_hqq_config_works_with_and_without_hqq(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bridge, "is_hqq_available", lambda: installed)
    m = load(quantization_config=transformers.HqqConfig(nbits=4, group_size=64), device_map="cpu")
    want = load(quantization_config=HqqConfig(4, 64))
    assert same(m, want)
    m.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hqqtensor"
    assert same(m, load(tmp_path))
    with pytest.raises(ValueError, match="axis"):
        transformers.HqqConfig(axis=2)


@pytest.mark.usefixtures("serves_hqq")
@pytest.mark.parametrize("installed", [True, False])
def test_transformers_dynamic_config_leaves_other_layers_alone(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "is_hqq_available", lambda: installed)
    q4, q3 = {"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": 32, "axis": 0}
    config = transformers.HqqConfig(dynamic_config={"self_attn.q_proj": q4, "mlp.down_proj": q3})
    m = load(quantization_config=config)
    layer = m.model.layers[2]
    assert len(quantized(m)) == 10 and layer.self_attn.q_proj.weight.nbits == 4
    assert (layer.mlp.down_proj.weight.nbits, layer.mlp.down_proj.weight.axis) == (3, 0)


@pytest.mark.usefixtures("serves_hqq")
def test_transformers_skip_modules_are_left_alone() -> None:
    m = load(quantization_config=transformers.HqqConfig(skip_modules=["lm_head", "mlp.up_proj"]))
    assert len(quantized(m)) == 30 and type(m.model.layers[0].mlp.up_proj.weight) is nn.Parameter


def test_tags_without_numbers_find_nested_layers() -> None:
    class Config:
        quant_config = {"encoder.fc": {"weight_quant_params": {"nbits": 3, "group_size": 8}}}
        skip_modules = ["encoder.out"]

    inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([inner])})})
    found = bridge.from_transformers(Config, model)
    assert list(found.dynamic_config) == ["*", "encoder.layers.0.fc"] and found.skip_modules == ["encoder.layers.0.out"]


# the torchao route


@pytest.mark.parametrize(
    "options",
    [
        {}, {"quant_scale": True}, {"quant_zero": True}, {"quant_scale": True, "quant_zero": True, "axis": 0},
        {"quant_scale": True, "meta_nbits": 4}, {"quant_scale": True, "quant_zero": True, "meta_nbits": 4, "axis": 0},
        {"quant_scale": True, "format": "nf4"}, {"format": "codebook"}, {"solver": "column_scaled", "quant_zero": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_torchao_route_saves_and_loads(options: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.TorchAoConfig(HqqConfig(4, 16, **options))
    m = load(quantization_config=config)
    assert len(quantized(m)) == 35
    m.save_pretrained(tmp_path, max_shard_size="2MB")
    again = load(tmp_path)
    assert same(m, again) and torch.equal(m(IDS).logits, again(IDS).logits)
    want = load(quantization_config=HqqConfig(4, 16, **options))
    assert same(want, again)


@pytest.mark.parametrize("by_name", [{"dynamic_config": {"q_proj": {"nbits": 3}}}, {"skip_modules": ["q_proj"]}])
def test_the_torchao_route_refuses_settings_by_name(by_name: dict[str, Any]) -> None:
    config = HqqConfig(4, 64, **by_name)
    for quant_type in (config, FqnToConfig({"_default": None, "model.layers.0": config})):
        with pytest.raises(ValueError, match=r"module names, which torchao's quantize_ does not pass"):
            transformers.TorchAoConfig(quant_type)
    with pytest.raises(ValueError, match=r"module names, which torchao's quantize_ does not pass"):
        torchao.quantization.quantize_(nn.Sequential(nn.Linear(64, 64)), config)
    transformers.TorchAoConfig(HqqConfig(skip_modules=[]))
