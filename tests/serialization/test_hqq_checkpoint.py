import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hqqtensor import HqqConfig, HQQTensor, hqq_weight_only, load_model, quantize_, save_model
from hqqtensor.cli import main
from hqqtensor.serialization.hqq_export import export_layer
from hqqtensor.serialization.hqq_layer import read_layer
from hqqtensor.serialization.layout import CheckpointError

WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def layer(nbits: float = 4, axis: int = 1, size: int | None = 32, dtype: torch.dtype = torch.float16,
          shape: tuple[int, int] = (64, 96), **options: Any) -> HQQLinear:  # fmt: skip
    torch.manual_seed(1)
    config = BaseQuantizeConfig(nbits=nbits, group_size=size, axis=axis, **options)
    return HQQLinear(nn.Linear(shape[1], shape[0]), config, compute_dtype=dtype, device="cpu")


def entries(q: HQQLinear, encoded: bool = True) -> dict[str, Any]:
    q.encoded_state_dict = encoded
    return {key: value for key, value in q.state_dict().items() if key != "bias"}


def in_float32(q: HQQLinear) -> Tensor:
    """hqq's own dequantize of the stored numbers, in arithmetic that does not round."""
    meta = {**q.meta, "compute_dtype": torch.float32}
    meta |= {key: meta[key].float() for key in ("scale", "zero")}
    return Quantizer.dequantize(q.W_q, meta)


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", WIDTHS)
def test_every_width_and_axis_is_read_exactly(nbits: float, axis: int, encoded: bool) -> None:
    q = layer(nbits, axis)
    got = read_layer("x", entries(q, encoded))
    assert got.dtype == torch.float16 and got.nbits == (2 if nbits == 1.58 else nbits)
    assert torch.equal(got.dequantize(torch.float32), in_float32(q))
    # hqq rounds twice in float16, after the difference and after the product; we round once.
    want = q.dequantize()
    assert torch.equal(got.dequantize(), in_float32(q).half()) and torch.allclose(got.dequantize(), want, rtol=2**-10)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", WIDTHS)
def test_in_float32_hqq_and_we_give_the_same_bits(nbits: float, axis: int) -> None:
    q = layer(nbits, axis, None, torch.float32)
    assert torch.equal(read_layer("x", entries(q)).dequantize(), q.dequantize())


@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_viewed_as_floats_are_read(nbits: int, dtype: torch.dtype) -> None:
    q = layer(nbits, 1, 32, dtype, view_as_float=True)
    assert torch.equal(read_layer("x", entries(q)).dequantize(torch.float32), in_float32(q))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(3, 8), (4, 8), (3, 16), (8, 8)]), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 1]),
)  # fmt: skip
def test_groups_that_run_over_row_ends_are_read_exactly(
    width: tuple[int, int], rows: int, cols: int, axis: int
) -> None:
    nbits, size = width
    rows, cols = rows * 4, cols * 4
    if rows * cols % (size * 2):
        rows *= size
    q = layer(nbits, axis, size, torch.float32, (rows, cols))
    assert torch.equal(read_layer("x", entries(q)).dequantize(), q.dequantize())


def with_quantized(q: HQQLinear, what: str, group: int | None, axis: int = 0, stack: bool = False) -> dict[str, Any]:
    """What hqq made of ``scale`` and ``zero`` under quant_scale and quant_zero, before 0.2 dropped them."""
    meta = dict(q.meta)
    for part in what.split():
        params = {"nbits": 8, "channel_wise": group is not None, "group_size": group, "optimize": False, "axis": axis}
        meta[f"{part}_q"], meta[f"meta_{part}"] = Quantizer.quantize(meta.pop(part), device="cpu", **params)
        meta[f"meta_{part}"]["compute_dtype"] = q.compute_dtype
        Quantizer.to_inplace(None, meta[f"meta_{part}"], "cpu")
        meta[f"quant_{part}"] = True
    q.meta = meta
    if stack:
        parts = ("zero_q", "scale_q") if "scale_q" in meta else ("zero", "scale")
        meta["zero_scale"] = torch.stack([meta.pop(p) for p in parts])
    return {"W_q": q.W_q, "meta": meta}


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("what", ["scale zero", ""])
@pytest.mark.parametrize(("axis", "meta_axis"), [(0, 0), (1, 0), (1, 1)])
def test_old_layers_with_quantized_scales_are_read_exactly(axis: int, meta_axis: int, what: str, stack: bool) -> None:
    q = layer(4, axis, 16, torch.float32, (64, 64))
    got = read_layer("x", with_quantized(q, what, 64, meta_axis, stack))
    assert torch.equal(got.dequantize(), q.dequantize())


def test_zeros_quantized_as_one_group_beside_plain_scales_are_read() -> None:
    q = layer(2, 1, 16, torch.float32)
    assert torch.equal(read_layer("x", with_quantized(q, "zero", None)).dequantize(), q.dequantize())
    half = layer(4, 1, 16)
    got = read_layer("x", with_quantized(half, "scale zero", 64))
    assert torch.allclose(got.dequantize(), half.dequantize(), rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("W_q", torch.zeros(3, 32, dtype=torch.uint8), "packed codes should be"),
        ("W_q", torch.zeros(96, 32), "packed codes should be"),
        ("W_q", "text", "W_q is no tensor"),
        ("scale", torch.ones(5, 1), "scale should be 192 numbers"),
        ("scale", torch.ones(192, 1, dtype=torch.int32), "scale should be 192 numbers"),
        ("zero", torch.full((192, 1), float("nan")), "NaN or Inf"),
        ("nbits", torch.tensor(7), "nbits must be one of"),
        ("nbits", torch.tensor([4, 4]), "nbits must be one of"),
        ("axis", 2, "axis must be one of"),
        ("packing", "2bit_u8", "does not go with 4 bits"),
        ("packing", torch.tensor(list(b"__import__('os')"), dtype=torch.uint8), "does not go with"),
        ("shape", torch.tensor([2**40, 2**40]), "bad shape"),
        ("shape", torch.tensor([64, -96]), "bad shape"),
        ("shape", torch.ones(2), "shape must be a list"),
        ("shape", torch.tensor([64, 960]), "should be"),
        ("group_size", 0, "group_size 0 does not divide"),
        ("group_size", 7, "group_size 7 does not divide"),
        ("group_size", "8", "must be a whole number"),
        ("compute_dtype", "torch.os", "compute_dtype must be one of"),
        ("meta", [1], "meta is no dict"),
        ("quant_scale", True, "lacks scale_q"),
        ("view_as_float", True, "viewed as floats"),
    ],
)
def test_hostile_layers_are_refused(key: str, value: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_layer("x", {**entries(layer(), encoded=False), key: value})


def test_codes_beyond_the_width_are_refused() -> None:
    bad = entries(layer(5), encoded=False)
    bad["W_q"] = bad["W_q"].clone()
    bad["W_q"][0, 0] = 32
    with pytest.raises(CheckpointError, match="codes over 31"):
        read_layer("x", bad)


# whole models


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


Made = tuple[Path, dict[str, Tensor]]


@pytest.fixture(params=["A", "B", "C"])
def checkpoint(request: pytest.FixtureRequest, dense: Path, tmp_path: Path) -> Made:
    """A model directory of the hqq library in each layout, and hqq's own weights in float32."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    want: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            config = BaseQuantizeConfig(nbits=4, group_size=32)
            q = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            q.encoded_state_dict = request.param == "A"
            want[f"{name}.weight"] = q.dequantize()
            modules[name] = {"W_q": q.W_q, "meta": q.meta, "bias": None} if request.param == "C" else q.state_dict()
        elif not list(module.children()) and module.state_dict():
            modules[name] = dict(module.state_dict())
    shutil.copy(dense / "config.json", tmp_path)
    if request.param == "A":
        save_file(
            {f"{m}.{k}": v.contiguous() for m, e in modules.items() for k, v in e.items()},
            tmp_path / "model.safetensors", {"format": "pt"},
        )  # fmt: skip
        settings = json.loads((dense / "config.json").read_text())
        quant = {"quant_config": BaseQuantizeConfig(nbits=4, group_size=32), "skip_modules": ["lm_head"]}
        settings["quantization_config"] = {"quant_method": "hqq", **quant}
        (tmp_path / "config.json").write_text(json.dumps(settings))
    else:
        torch.save(modules, tmp_path / "qmodel.pt")
    return tmp_path, want


def check(model: nn.Module, want: dict[str, Tensor], dense: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    for name, tensor in model.state_dict().items():
        if name in want:
            assert isinstance(tensor, HQQTensor) and torch.equal(tensor.dequantize(), want[name]), name
        else:
            assert torch.equal(tensor, plain[name]), name


def test_load_model_reads_all_layouts(checkpoint: Made, dense: Path) -> None:
    directory, want = checkpoint
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(dense))
    load_model(model, directory)
    assert len(want) == 14
    check(model, want, dense)


def test_convert_makes_a_directory_for_from_pretrained(checkpoint: Made, dense: Path, tmp_path: Path) -> None:
    directory, want = checkpoint
    assert main(["convert", str(directory), str(tmp_path / "out"), "--max-shard-size", "40KB"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.group_size == 32
    check(model, want, dense)


@pytest.mark.usefixtures("serves_hqq")
@pytest.mark.parametrize("checkpoint", ["A"], indirect=True)
def test_from_pretrained_reads_the_flat_layout_and_saves_ours(checkpoint: Made, dense: Path, tmp_path: Path) -> None:
    directory, want = checkpoint
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    check(model, want, dense)
    model.save_pretrained(tmp_path / "again")
    assert '"quant_method": "hqqtensor"' in (tmp_path / "again" / "config.json").read_text()
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), want, dense)


@pytest.mark.usefixtures("serves_hqq")
@pytest.mark.parametrize("checkpoint", ["A"], indirect=True)
def test_a_hostile_directory_is_refused_before_anything_changes(checkpoint: Made, dense: Path) -> None:
    directory, _ = checkpoint
    file = directory / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.shape"
    save_file({**tensors, key: tensors[key] * 2}, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(dense)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for load in (lambda: load_model(model, directory), lambda: AutoModelForCausalLM.from_pretrained(directory)):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: zero should be 1024 numbers"):
            load()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_pickles_with_code_and_damaged_files_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return exec, ("raise SystemExit('code ran')",)

    for content in ({"a": {"W_q": Evil()}}, [1, 2], {"a": 3}, {"a": {"b": object}}):
        torch.save(content, tmp_path / "qmodel.pt")
        with pytest.raises(CheckpointError, match=r"qmodel\.pt"):
            load_model(nn.Linear(2, 2), tmp_path)
    (tmp_path / "qmodel.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match=r"qmodel\.pt"):
        load_model(nn.Linear(2, 2), tmp_path)


# export


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1])
def test_hqq_reads_what_we_export(nbits: int, axis: int) -> None:
    config = hqq_weight_only(nbits, 32, axis=axis, scale_dtype=torch.float32)
    tensor = HQQTensor.from_hp(torch.randn(64, 96), config)
    q = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    entries = export_layer("x", tensor)
    q.load_state_dict(dict(entries))
    assert torch.equal(q.dequantize(), tensor.dequantize())
    assert torch.equal(read_layer("x", entries), tensor)


@pytest.mark.parametrize(
    ("config", "shape", "match"),
    [
        (hqq_weight_only(7, 32), (64, 96), "7 bits"),
        (hqq_weight_only(4, 64), (64, 96), "does not divide"),
        (hqq_weight_only(1, 32), (3, 32), "3 grouped rows in slabs of 8"),
        (hqq_weight_only(4, 32), (2, 64, 96), "no plain 2-D weight"),
    ],
)
def test_what_hqq_has_no_form_for_is_named(config: HqqConfig, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=f"a.weight: cannot be kept.*{match}"):
        export_layer("a.weight", HQQTensor.from_hp(torch.randn(shape), config))


@pytest.mark.usefixtures("serves_hqq")
def test_convert_back_and_forth_keeps_every_bit(dense: Path, tmp_path: Path) -> None:
    ours, theirs, again = (str(tmp_path / name) for name in ("ours", "theirs", "again"))
    assert main(["quantize", str(dense), ours, "--group-size", "32", "--embeddings", "none", "--json"]) == 0
    assert main(["convert", ours, theirs, "--to", "hqq"]) == 0
    assert main(["convert", theirs, again, "--json"]) == 0
    want = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    for directory in (theirs, again):
        for name, tensor in AutoModelForCausalLM.from_pretrained(directory).state_dict().items():
            assert torch.equal(tensor, want[name]), name


@pytest.mark.usefixtures("serves_hqq")
def test_embeddings_become_dense_for_hqq(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    assert main(["quantize", str(dense), ours, "--group-size", "32", "--json"]) == 0
    assert main(["convert", ours, theirs, "--to", "hqq"]) == 0
    assert "hqq quantizes linear layers alone: " in (said := capsys.readouterr().err) and "embed_tokens" in said
    want, found = (AutoModelForCausalLM.from_pretrained(name).model for name in (ours, theirs))
    assert isinstance(want.embed_tokens.weight, HQQTensor) and not isinstance(found.embed_tokens.weight, HQQTensor)
    assert torch.equal(found.embed_tokens.weight, want.embed_tokens.weight.dequantize())
    assert isinstance(found.layers[0].mlp.up_proj.weight, HQQTensor)


def test_convert_says_what_it_cannot_read(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out")]) == 2
    assert "holds no quantized weights" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_save_model_of_a_small_model_reads_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, hqq_weight_only(4, 32))
    save_model(model, tmp_path)
    assert "0.weight" in load_file(tmp_path / "model.safetensors")  # the guard
    load_model(model, tmp_path)


def test_a_slice_of_rows_keeps_its_groups_when_exported() -> None:
    """With axis 0: half of the rows are in as many groups, each with half the members."""
    tensor = HQQTensor.from_hp(torch.randn(64, 96), hqq_weight_only(4, 32, axis=0, scale_dtype=torch.float32))
    half = tensor[:32]
    assert torch.equal(read_layer("x", export_layer("x", half)).dequantize(), tensor.dequantize()[:32])
    with pytest.raises(ValueError, match="does not divide"):
        export_layer("x", tensor[:33])


@pytest.mark.parametrize("value", [torch.empty((), device="meta"), torch.ones(64, 1).to_sparse()])
@pytest.mark.parametrize("key", ["nbits", "scale", "other"])
def test_tensors_of_a_pickle_that_hold_no_numbers_are_refused(key: str, value: Tensor, tmp_path: Path) -> None:
    for changed in ({key: value}, {"meta": {key: value}}):
        torch.save({"0": {**entries(layer()), **changed}}, tmp_path / "qmodel.pt")
        with pytest.raises(CheckpointError, match=r"qmodel\.pt: '0' has a tensor that is sparse or holds no numbers"):
            load_model(nn.Sequential(nn.Linear(96, 64)), tmp_path)
