"""GPTQ and AWQ checkpoints, packed here bit by bit after their public layouts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hqqtensor import HQQTensor, load_model
from hqqtensor.cli import main
from hqqtensor.serialization.gptq_checkpoint import read_settings
from hqqtensor.serialization.gptq_layer import PackedSettings, read_packed
from hqqtensor.serialization.layout import CheckpointError


def words_of(codes: list[int], bits: int) -> list[int]:
    """One stream of bits, the first code in the lowest, cut into int32 words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def packed(rows: Tensor, bits: int) -> Tensor:
    return torch.tensor([words_of(row, bits) for row in rows.tolist()], dtype=torch.int32)


class Layer:
    """Random codes, zero points and scales of one layer [N, K], its tensors on disk and its exact weights."""

    def __init__(self, rows: int, columns: int, bits: int = 4, size: int = 32, version: str = "gptq",
                 dtype: torch.dtype = torch.float16, index: Tensor | None = None, seed: int = 0) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        groups = -(-columns // size)
        self.codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
        # Version 1 keeps zero - 1: a zero point of 0 has a test of its own.
        self.zeros = torch.randint(int(version == "gptq"), 2**bits, (rows, groups), generator=g)
        self.scales = ((torch.rand(rows, groups, generator=g) * 0.02 + 2e-3) * 2.0 ** (4 - bits)).to(dtype)
        self.index = torch.arange(columns) // size if index is None else index
        self.settings = PackedSettings(version, bits, size)
        self.weight = (self.codes - self.zeros[:, self.index]) * self.scales[:, self.index]
        if version == "awq":
            order = [8 * block + place for block in range(rows // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
            qweight, qzeros = packed(self.codes.t()[:, order], bits), packed(self.zeros.t()[:, order], bits)
        else:
            qweight = packed(self.codes, bits).t().contiguous()
            qzeros = packed(self.zeros.t() - int(version == "gptq"), bits)
        self.entries = {"qweight": qweight, "qzeros": qzeros, "scales": self.scales.t().contiguous()}
        if version != "awq":
            self.entries["g_idx"] = self.index.to(torch.int32)

    def exact(self) -> Tensor:
        return (self.codes - self.zeros[:, self.index]) * self.scales.float()[:, self.index]

    def read(self, unordered: str = "error", **changes: Any) -> Any:
        return read_packed("m.q_proj", {**self.entries, **changes}, self.settings, unordered)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_exactly(bits: int, version: str, dtype: torch.dtype) -> None:
    layer = Layer(64, 96, bits, 32, version, dtype)
    got = layer.read()
    assert (got.nbits, got.group_size, got.axis, got.dtype) == (bits, 32, 1, dtype)
    assert torch.equal(got.dequantize(), layer.weight)
    assert torch.equal(got.dequantize(torch.float32), layer.exact())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([16, 32, 128, 4096]), st.sampled_from(["gptq_v2", "awq"]))
def test_any_shape_and_group_size_is_read_exactly(rows: int, columns: int, size: int, version: str) -> None:
    layer = Layer(rows * 8, columns * 24, 4, size, version)
    assert torch.equal(layer.read().dequantize(), layer.weight)


def test_awq_is_read_exactly() -> None:
    layer = Layer(64, 96, 4, 32, "awq")
    assert torch.equal(layer.read().dequantize(), layer.weight)
    x = torch.randn(3, 96)
    assert torch.allclose(nn.functional.linear(x, layer.read().to(torch.float32)), x @ layer.exact().t(), atol=1e-5)


def test_a_group_size_of_minus_one_is_the_whole_row() -> None:
    layer = Layer(32, 64, 4, 64)
    layer.settings = PackedSettings("gptq", 4, None)
    assert layer.read().group_size == 64 and torch.equal(layer.read().dequantize(), layer.weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_in_version_1_are_read_as_gptqmodel_writes_them(bits: int) -> None:
    # GPTQModel takes 1 off every field of the whole word at once, borrows included.
    layer = Layer(32, 64, bits, 32, "gptq_v2")
    layer.zeros[:, 0] = 0
    layer.weight = (layer.codes - layer.zeros[:, layer.index]) * layer.scales[:, layer.index]
    ones = sum(1 << shift for shift in range(0, 32, bits))
    qzeros = ((packed(layer.zeros.t(), bits).long() & 0xFFFFFFFF) - ones) & 0xFFFFFFFF
    layer.settings = PackedSettings("gptq", bits, 32)
    got = layer.read(qzeros=torch.where(qzeros < 2**31, qzeros, qzeros - 2**32).to(torch.int32))
    assert torch.equal(got.dequantize(), layer.weight)


def test_zero_points_of_0_at_3_bits_wrap_alone() -> None:
    layer = Layer(32, 64, 3, 32, "gptq_v2")
    layer.zeros[:, 0] = 0
    layer.weight = (layer.codes - layer.zeros[:, layer.index]) * layer.scales[:, layer.index]
    layer.settings = PackedSettings("gptq", 3, 32)
    assert torch.equal(layer.read(qzeros=packed((layer.zeros.t() - 1) % 8, 3)).dequantize(), layer.weight)


@pytest.mark.parametrize(("rows", "columns", "bits"), [(61, 96, 4), (64, 93, 4), (61, 93, 2), (63, 95, 8), (50, 70, 3)])
def test_words_that_are_filled_up_at_the_end_are_read(rows: int, columns: int, bits: int) -> None:
    layer = Layer(96, 128, bits)
    groups = -(-columns // 32)
    words = {2: 16, 3: 32, 4: 8, 8: 4}[bits]  # codes in a run of words
    last, wide = (-(-n // words) * words * bits // 32 for n in (columns, rows))
    got = layer.read(
        qweight=layer.entries["qweight"][:last, :rows].contiguous(),
        qzeros=layer.entries["qzeros"][:groups, :wide].contiguous(),
        scales=layer.entries["scales"][:groups, :rows].contiguous(), g_idx=layer.entries["g_idx"][:columns],
    )  # fmt: skip
    assert torch.equal(got.dequantize(), layer.weight[:rows, :columns])


# the order of inputs (desc_act)


def test_groups_in_another_order_but_of_neighbours_are_exact() -> None:
    index = torch.tensor([2, 0, 1]).repeat_interleave(32)
    layer = Layer(32, 96, index=index)
    assert layer.read().group_size == 32 and torch.equal(layer.read().dequantize(), layer.weight)


def test_runs_shorter_than_a_group_become_finer_groups_with_the_same_scales() -> None:
    index = torch.tensor([0, 1, 0, 2, 2, 1]).repeat_interleave(16)
    layer = Layer(32, 96, index=index)
    got = layer.read()
    assert got.group_size == 16 and torch.equal(got.dequantize(), layer.weight)


def test_an_order_that_groups_cannot_express_is_refused_or_kept_dense() -> None:
    layer = Layer(32, 96, index=torch.randperm(96, generator=torch.Generator().manual_seed(0)) // 32)
    with pytest.raises(CheckpointError, match=r"m\.q_proj: .*desc_act.*--act-order dense"):
        layer.read()
    dense = layer.read("dense")
    assert not isinstance(dense, HQQTensor) and dense.dtype == torch.float16 and torch.equal(dense, layer.weight)


# strangers' files


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("qweight", None, "lacks qweight"),
        ("qzeros", None, "lacks qzeros"),
        ("scales", None, "lacks scales"),
        ("qweight", torch.zeros(12, 64), "qweight should be of rank 2 and .*int32"),
        ("qweight", torch.zeros(12, 64, 1, dtype=torch.int32), "qweight should be of rank 2"),
        ("qweight", torch.zeros(12, 0, dtype=torch.int32), "qweight should be of rank 2"),
        ("qweight", torch.zeros(12, 32, dtype=torch.int32), "do not fit qweight"),
        ("qweight", torch.zeros(24, 64, dtype=torch.int32), "do not fit scales"),
        ("qzeros", torch.zeros(3, 4, dtype=torch.int32), "do not fit qzeros"),
        ("qzeros", torch.zeros(2, 8, dtype=torch.int32), "do not fit qzeros"),
        ("scales", torch.ones(4, 64).half(), "do not fit scales"),
        ("scales", torch.ones(3, 64, dtype=torch.int32), "scales should be"),
        ("scales", torch.full((3, 64), float("nan")), "NaN or Inf"),
        ("g_idx", torch.full((96,), 3), "g_idx should be 96 numbers of groups below 3"),
        ("g_idx", torch.full((96,), -1), "g_idx should be 96 numbers"),
        ("g_idx", torch.zeros(60, dtype=torch.int32), "g_idx should be 96 numbers"),
        ("g_idx", torch.zeros(96), "g_idx should be of rank 1"),
    ],
)
def test_hostile_layers_are_refused(key: str, value: Tensor | None, match: str) -> None:
    layer = Layer(64, 96)
    if value is None:
        del layer.entries[key]
        value = {}  # type: ignore[assignment]
    changes = {key: value} if isinstance(value, Tensor) else {}
    with pytest.raises(CheckpointError, match=rf"m\.q_proj: .*{match}"):
        layer.read(**changes)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**GPTQ, "bits": 5}, r"bits must be one of \[2, 3, 4, 8\], got 5"),
        ({**GPTQ, "bits": True}, "bits must be one of"),
        ({**AWQ, "bits": 8}, r"bits must be one of \[4\]"),
        ({**GPTQ, "group_size": 0}, "group_size must be -1 or positive"),
        ({**GPTQ, "group_size": "__import__('os')"}, "group_size must be"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "the gptq format 'marlin' is not read"),
        ({**GPTQ, "is_marlin_format": True}, "Marlin"),
        ({**GPTQ, "pack_dtype": "int16"}, "int32"),
        ({**GPTQ, "dynamic": {"+:.*q_proj": {"bits": 8}}}, "dynamic"),
        ({**AWQ, "version": "gemv"}, "the awq format 'gemv' is not read; gemm"),
        ({**GPTQ, "quant_method": "aqlm"}, "'aqlm' is not read"),
    ],
)
def test_settings_that_are_not_read_are_named(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{match}"):
        read_settings(tmp_path)


def test_settings_files_of_older_programs_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no config\.json, quantize_config\.json"):
        read_settings(tmp_path)
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 64, "version": "GEMM"}')
    assert read_settings(tmp_path) == PackedSettings("awq", 4, 64)
    (tmp_path / "quantize_config.json").write_text('{"bits": 3, "group_size": -1, "dynamic": {"-:lm_head": {}}}')
    assert read_settings(tmp_path) == PackedSettings("gptq", 3, None)


# whole models


Made = tuple[Path, Path]


def make(path: Path, config: dict[str, Any], order: bool = False, name: str = "model.safetensors") -> Made:
    """A tiny Llama with packed linear layers in ``path/packed``, and dense with its exact weights in ``path/dense``."""
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(llama)
    tensors = dict(model.state_dict())
    version = "awq" if config["quant_method"] == "awq" else config.get("checkpoint_format", "gptq")
    for seed, (module, linear) in enumerate(model.named_modules()):
        if isinstance(linear, nn.Linear) and module != "lm_head":
            index = torch.randperm(linear.in_features) // 32 if order and module.endswith("o_proj") else None
            layer = Layer(*linear.weight.shape, config["bits"], 32, version, index=index, seed=seed)
            linear.weight.data = layer.weight.float() if index is not None else layer.exact()
            del tensors[f"{module}.weight"]
            tensors |= {f"{module}.{key}": t for key, t in layer.entries.items()}
    model.save_pretrained(path / "dense")
    (path / "packed").mkdir()
    save_file({key: t.clone().contiguous() for key, t in tensors.items()}, path / "packed" / name, {"format": "pt"})
    settings = json.loads((path / "dense" / "config.json").read_text())
    (path / "packed" / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return path / "packed", path / "dense"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def check(model: nn.Module, dense: Path, quantized: int = 14) -> None:
    plain = AutoModelForCausalLM.from_pretrained(dense)
    found = {name: p for name, p in model.named_parameters() if isinstance(p, HQQTensor)}
    assert len(found) == quantized
    for name, tensor in model.state_dict().items():
        value = tensor.dequantize(torch.float32) if isinstance(tensor, HQQTensor) else tensor
        assert torch.equal(value, plain.state_dict()[name]), name
    if all(p.dtype == torch.float32 for p in found.values()):
        assert torch.allclose(logits(model), logits(plain), atol=1e-5)


@pytest.mark.parametrize(
    "config", [GPTQ, {**GPTQ, "checkpoint_format": "gptq_v2", "bits": 8}, {**GPTQ, "bits": 3}, AWQ],
    ids=["gptq", "gptq_v2", "gptq3", "awq"],
)  # fmt: skip
def test_convert_makes_a_directory_with_the_exact_weights(config: dict[str, Any], tmp_path: Path) -> None:
    source, dense = make(tmp_path, config)
    assert main(["convert", str(source), str(tmp_path / "out"), "--max-shard-size", "40KB"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.config.quantization_config.nbits, model.config.quantization_config.group_size) == (config["bits"], 32)
    check(model, dense)
    for directory in (source, tmp_path / "out"):
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(dense))
        load_model(empty, directory)
        check(empty, dense)


def test_the_only_safetensors_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    source, dense = make(tmp_path, GPTQ, name="gptq_model-4bit-32g.safetensors")
    assert main(["convert", str(source), str(tmp_path / "out"), "--json"]) == 0
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), dense)


def test_layers_in_an_order_of_their_own_are_kept_dense_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dense = make(tmp_path, {**GPTQ, "desc_act": True}, order=True)
    args = ["convert", str(source), str(tmp_path / "out")]
    assert main(args) == 2 and not (tmp_path / "out").exists()
    assert "self_attn.o_proj" in capsys.readouterr().err
    assert main([*args, "--act-order", "dense"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    check(model, dense, quantized=12)


def test_a_damaged_directory_changes_nothing(tmp_path: Path) -> None:
    source, dense = make(tmp_path, AWQ)
    file = source / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.scales"
    save_file({**tensors, key: tensors[key][:1].clone()}, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(dense)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: .*do not fit scales"):
        load_model(model, source)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: stored both dense and packed"):
        load_model(model, source)


def test_config_is_for_gguf_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = make(tmp_path, GPTQ)
    shutil.copytree(source, tmp_path / "other")
    assert main(["convert", str(source), str(tmp_path / "out"), "--config", str(tmp_path / "other")]) == 2
    assert "--config is for .gguf files" in capsys.readouterr().err
