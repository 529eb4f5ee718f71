import json

import pytest
import torch
from fresh_python import run_fresh
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hqqtensor import HQQTensor, hqq_weight_only, load_model, quantize_, save_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.layout import CheckpointError, flatten, parse_entry


def model(**options) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    if options:
        quantize_(m, hqq_weight_only(**options))
    return m


OPTIONS = [
    {"nbits": 3, "group_size": 64}, {"nbits": 4, "group_size": 32, "axis": 0},
    {"nbits": 2, "group_size": 16, "quant_scale": True, "quant_zero": True},
    {"nbits": 2, "group_size": 12, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    {"nbits": 4, "group_size": 64, "view_as_float": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", ["dense", "quantized", "meta"])
@pytest.mark.parametrize("limit", ["5GB", "8KB"])
def test_loading_gives_every_bit_back(tmp_path, options, target, limit) -> None:
    m = model(**options)
    save_model(m, tmp_path / "m", max_shard_size=limit)
    other = model(**(options if target == "quantized" else {}))
    if target == "meta":
        other = other.to("meta")
    assert load_model(other, tmp_path / "m") == ([], [])
    for key, value in m.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_a_new_process_computes_the_same(tmp_path) -> None:
    m = model(nbits=3, group_size=64)
    save_model(m, tmp_path / "m.safetensors")
    x = torch.randn(4, 256)
    torch.save({"x": x, "y": m(x)}, tmp_path / "xy.pt")
    code = (
        "import torch, hqqtensor; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))\n"
        f"hqqtensor.load_model(m, {str(tmp_path / 'm.safetensors')!r}); d = torch.load({str(tmp_path / 'xy.pt')!r})\n"
        "assert torch.equal(m(d['x']), d['y'])"
    )
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("nbits", range(1, 9))
def test_saved_size_is_the_arithmetic(tmp_path, nbits: int) -> None:
    m = nn.Sequential(nn.Linear(704, 512, bias=False))
    quantize_(m, hqq_weight_only(nbits, 64))
    save_model(m, tmp_path / "m.safetensors")
    arithmetic = 704 * 512 * nbits / 8 + 2 * 2 * 512 * 11
    assert (tmp_path / "m.safetensors").stat().st_size == pytest.approx(arithmetic, rel=0.03)
    assert inspect_checkpoint(tmp_path / "m.safetensors").nbytes == arithmetic


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path) -> None:
    m = nn.ModuleDict({"e": nn.Embedding(100, 64), "h": nn.Linear(64, 100, bias=False)})
    m["h"].weight = m["e"].weight
    quantize_(m, hqq_weight_only(4, 64))
    save_model(m, tmp_path)
    assert len(inspect_checkpoint(tmp_path).tensors) == 1
    other = nn.ModuleDict({"e": nn.Embedding(100, 64), "h": nn.Linear(64, 100, bias=False)}).to("meta")
    load_model(other, tmp_path)
    assert other["h"].weight is other["e"].weight and isinstance(other["h"].weight, HQQTensor)


def _damage(path, **changes) -> None:
    with safe_open(path, "pt") as f:
        header = f.metadata()
    entry = json.loads(header["0.weight"])
    entry["_data"].update(changes)
    save_file(load_file(path), path, metadata={**header, "0.weight": json.dumps(entry)})


@pytest.mark.parametrize(
    "changes",
    [
        {"nbits": 5}, {"nbits": 0}, {"nbits": True}, {"group_size": 0}, {"group_size": 32}, {"axis": 0}, {"axis": 7},
        {"shape": [128, 512]}, {"shape": [2**62, 2**62]}, {"shape": [-1, 256]}, {"dtype": "int8"}, {"format": "eval"},
        {"dtype": ["float16"]}, {"dtype": {"_type": "torch.dtype", "_data": []}}, {"view_as_float": []},
    ],
)  # fmt: skip
def test_metadata_that_does_not_match_is_refused_and_nothing_changes(tmp_path, changes) -> None:
    path = tmp_path / "m.safetensors"
    save_model(model(nbits=4, group_size=64), path)
    _damage(path, **changes)
    other = model()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight"):
        load_model(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_missing_truncated_and_unfitting_files_are_refused(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no checkpoint"):
        load_model(model(), path)
    save_model(model(nbits=4, group_size=64), path)
    with pytest.raises(ValueError, match="the file has shape"):
        load_model(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), path)
    with pytest.raises(RuntimeError, match="missing"):
        load_model(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(8, 8)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(model(), path)


def test_load_state_dict_with_and_without_assign() -> None:
    m = model(nbits=4, group_size=64)
    dense, same = model(), model(nbits=4, group_size=64)
    dense.load_state_dict(m.state_dict(), assign=True)
    assert torch.equal(dense[0].weight, m[0].weight)
    same.load_state_dict(m.state_dict())
    assert torch.equal(same[0].weight, m[0].weight)
    plain = model()
    plain.load_state_dict(m.state_dict())
    assert torch.equal(plain[0].weight, m[0].weight.dequantize())


@pytest.mark.parametrize("changes", [{"nbits": 6}, {"axis": 1}, {"transposed": True}])
def test_quantized_scales_of_another_form_are_refused(changes) -> None:
    _, text = flatten("a.weight", model(nbits=2, group_size=16, quant_scale=True)[0].weight.detach())
    entry = json.loads(text)
    parse_entry("a.weight", text)
    entry["_nested"]["scale"]["_data"] |= changes
    with pytest.raises(CheckpointError, match="integers of 8 or 4 bits, axis 0"):
        parse_entry("a.weight", json.dumps(entry))
