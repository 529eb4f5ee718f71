"""accelerate keeps weights in memory or on the disk and moves them for each call: quantized ones too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from doclm_models import IDS, load, quantized, same
from fresh_python import run_fresh
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.integrations import patches
from hqqtensor.serialization.layout import CheckpointError

CONFIG = HqqConfig(4, 64)
PLACES = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.layers.3": "cpu", "model.layers.4": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
    "lm_head": "disk",
}  # fmt: skip


def small_model(meta: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Conv1d(4, 4, 3))
    more = {} if meta is None else {"quant_scale": True, "quant_zero": True, "meta_nbits": meta}
    quantize_(m, HqqConfig(3, 12, dynamic_config={"3": {}}, **more))
    return m


def by_cpu(m: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(m, "cpu")


def by_disk(m: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(m, folder, "cpu")


def by_dispatch(m: nn.Module, folder: Path) -> None:
    accelerate.dispatch_model(m, {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"}, offload_dir=folder)


@pytest.mark.parametrize("offload", [by_cpu, by_disk, by_dispatch])
@pytest.mark.parametrize("meta", [None, 8, 4])
def test_an_offloaded_model_computes_the_same(
    offload: Callable[[nn.Module, Path], None], meta: int | None, tmp_path: Path
) -> None:
    m, x = small_model(meta), torch.randn(4, 64)
    want = m(x)
    offload(m, tmp_path)
    for _ in range(2):
        assert torch.equal(m(x), want)
        weight = m[2].weight
        assert isinstance(weight, HQQTensor) and isinstance(weight, nn.Parameter) and weight.device.type == "meta"
    if offload is by_disk:
        sizes = {p.name: p.stat().st_size for p in tmp_path.glob("*.dat")}
        assert sizes["0.weight.dat"] < 64 * 64 and sizes["0.bias.dat"] == 64 * 4  # packed, and as accelerate has it
    accelerate.hooks.remove_hook_from_module(m, recurse=True)
    assert torch.equal(m(x), want)


def test_weights_that_are_one_stay_one() -> None:
    m = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    m["c"], m["d"] = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    m["b"].weight = m["a"].weight
    quantize_(m, CONFIG)
    assert m["a"].weight.data_ptr() == m["b"].weight.data_ptr() != m["c"].weight.data_ptr() != m["d"].weight.data_ptr()
    x = torch.randn(2, 64)
    want = {name: layer(x) for name, layer in m.items()}
    places = {"a": "cpu", "b": "cpu", "c": "cpu", "d": "cpu"}
    accelerate.dispatch_model(m, places, main_device="cpu", force_hooks=True)
    assert all(torch.equal(layer(x), want[name]) for name, layer in m.items())


def test_a_damaged_file_on_the_disk_is_refused(tmp_path: Path) -> None:
    m = small_model()
    by_disk(m, tmp_path)
    file = tmp_path / "2.weight.dat"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        m(torch.randn(4, 64))


def test_a_parameter_made_anew_by_its_type_is_the_same_weight() -> None:
    q = nn.Parameter(HQQTensor.from_hp(torch.randn(64, 64), CONFIG), requires_grad=False)
    again = type(q)(q, requires_grad=False)
    assert isinstance(again, nn.Parameter) and torch.equal(again, q) and not again.requires_grad
    assert again.qdata.data_ptr() == q.qdata.data_ptr()


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_from_pretrained_puts_weights_on_the_disk(pre_quantized: bool, model: Any, saved: Path, tmp_path: Path) -> None:
    options = {"device_map": PLACES, "offload_folder": tmp_path / "offload"}
    m = load(saved, **options) if pre_quantized else load(quantization_config=CONFIG, **options)
    assert torch.equal(m(IDS).logits, model(IDS).logits) and quantized(m) == quantized(model)
    assert m.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(
        m.generate(IDS, max_new_tokens=3, do_sample=False), model.generate(IDS, max_new_tokens=3, do_sample=False)
    )
    with pytest.warns(UserWarning, match="offloaded modules"):
        m.save_pretrained(tmp_path / "again", max_shard_size="1MB")
    assert same(load(tmp_path / "again"), model)
    with pytest.raises(ValueError, match="parts of the model are offloaded"):
        m.dequantize()


def test_auto_offloads_what_has_no_room(tmp_path: Path) -> None:
    # 23 MB in float32, of which 8.4 MB stay (embeddings and head), and 2.1 MB quantized.
    options = {"device_map": "auto", "dtype": torch.float32, "quantization_config": CONFIG}
    fits = load(max_memory={"cpu": 14_000_000}, **options)
    assert "disk" not in getattr(fits, "hf_device_map", {}).values()
    m = load(max_memory={"cpu": 6_000_000}, offload_folder=tmp_path, **options)
    assert "disk" in m.hf_device_map.values() and torch.equal(m(IDS).logits, fits(IDS).logits)


def test_the_disk_needs_a_folder() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.\d\..* goes to the disk, .* give offload_folder"):
        load(quantization_config=CONFIG, device_map=PLACES)


def test_a_version_that_cannot_be_taught_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (patch,) = [p for p in patches.patches() if p.target == "transformers.modeling_utils.accelerate_dispatch"]
    monkeypatch.setattr(patch, "problem", "it is gone")
    options = {"device_map": PLACES, "offload_folder": tmp_path}
    with pytest.raises(patches.PatchError, match=r"cannot change transformers \S+: it is gone\. Without that, loading"):
        load(quantization_config=CONFIG, **options)
    assert not list(tmp_path.iterdir())
    assert len(quantized(load(quantization_config=CONFIG, device_map="cpu"))) == 35
    load(**options)


def test_a_tied_head_on_the_disk_is_one_weight(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tied = HqqConfig(8, 64, dynamic_config={"embed_tokens": {"nbits": 8}}, skip_modules=[])
    want = load(tmp_path / "dense", quantization_config=tied)
    want.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    options = {"device_map": {**places, "lm_head": "disk"}, "offload_folder": tmp_path / "offload"}
    for m in (load(tmp_path / "dense", quantization_config=tied, **options), load(tmp_path / "saved", **options)):
        assert torch.equal(m(IDS).logits, want(IDS).logits)
        with pytest.warns(UserWarning, match="offloaded modules"):
            m.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")
        assert same(again, want) and again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("first", ["accelerate", "hqqtensor"])
def test_either_order_of_import_works(first: str, tmp_path: Path) -> None:
    second = "hqqtensor" if first == "accelerate" else "accelerate"
    code = f"""
import sys, {first}
assert {first == "accelerate"} or "accelerate" not in sys.modules
import {second}
import torch
from torch import nn
m = nn.Sequential(nn.Linear(64, 64))
hqqtensor.quantize_(m, hqqtensor.HqqConfig(4, 64))
want = m(torch.ones(1, 64))
accelerate.disk_offload(m, sys.argv[1], "cpu")
assert torch.equal(m(torch.ones(1, 64)), want)
"""
    done = run_fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hqqtensor" in json.loads((tmp_path / "index.json").read_text())["0.weight"]


def test_dense_models_are_offloaded_as_before(tmp_path: Path) -> None:
    m, want = load(device_map=PLACES, offload_folder=tmp_path / "offload"), load()
    assert torch.equal(m(IDS).logits, want(IDS).logits)
    small = nn.Sequential(nn.Linear(8, 8).bfloat16())
    accelerate.disk_offload(small, tmp_path / "dense", "cpu")
    assert small(torch.ones(1, 8, dtype=torch.bfloat16)).shape == (1, 8)
