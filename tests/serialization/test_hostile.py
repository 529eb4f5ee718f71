"""Files that claim what they do not hold: a CheckpointError that names the file or tensor, and nothing changes."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_fresh
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_, save_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.files import checkpoint_files
from hqqtensor.serialization.layout import CheckpointError

DEEP = "[" * 100_000


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = layers()
    quantize_(model, HqqConfig(4, 16, quant_scale=True, quant_zero=True))
    save_model(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def change_metadata(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def ours(**changes: Any) -> Callable[[dict[str, str]], None]:
    def change(metadata: dict[str, str]) -> None:
        metadata["hqqtensor"] = json.dumps({**json.loads(metadata["hqqtensor"]), **changes})

    return change


def entry(*path: str, **changes: Any) -> Callable[[dict[str, str]], None]:
    """Change ``_data`` of the first weight, or of what is nested in it."""

    def change(metadata: dict[str, str]) -> None:
        whole = json.loads(metadata["0.weight"])
        part = whole
        for step in path:
            part = part[step]
        part["_data"].update(changes)
        metadata["0.weight"] = json.dumps(whole)

    return change


def text(key: str, value: str) -> Callable[[dict[str, str]], None]:
    return lambda metadata: metadata.__setitem__(key, value)


def nest_again(metadata: dict[str, str]) -> None:
    whole = json.loads(metadata["0.weight"])
    whole["_nested"]["scale"]["_nested"] = {"scale": dict(whole["_nested"]["scale"])}
    metadata["0.weight"] = json.dumps(whole)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (ours(version=2), r"m\.safetensors: has format version 2; this hqqtensor reads up to 1"),
        (ours(version=999), "format version 999"),
        (ours(version=0), "format version 0"),
        (ours(version="1"), "format version '1'"),
        (ours(aliases={"0.bias": []}), "hqqtensor entry of the metadata is damaged"),
        (ours(aliases=[]), "damaged"),
        (ours(non_persistent_buffers=[[]]), "damaged"),
        (ours(non_persistent_buffers="steps"), "damaged"),
        (ours(save=[]), "damaged"),
        (text("hqqtensor", "[]"), "damaged"),
        (text("hqqtensor", DEEP), r"m\.safetensors: the hqqtensor entry of the metadata is JSON nested too deeply"),
        (text("tensor_names", DEEP), r"m\.safetensors: tensor_names is JSON nested too deeply"),
        (text("tensor_names", '[["0.weight"]]'), "no list of names"),
        (text("0.weight", '"HQQTensor"' + DEEP), r"0\.weight: its metadata is not valid JSON"),
        (text("0.weight", '{"HQQTensor": ' + DEEP), r"0\.weight: its metadata is JSON nested too deeply"),
        (text("0.weight", '["HQQTensor"]'), r"0\.weight: metadata is not of an HQQTensor"),
        (entry(format=[]), r"0\.weight: format must be a name, got \[\]"),
        (entry(format={}), r"0\.weight: format must be a name"),
        (entry(activation=[]), r"0\.weight: activation must be one of"),
        (entry(shape=[64.0, 64]), r"0\.weight: shape must be a list of whole numbers"),
        (entry(shape=[64, 2**70]), r"0\.weight: shape must be 2 to 8 numbers"),
        (entry(shape=[2**39, 2**39]), r"0\.weight: shape .* overflows"),
        (entry(group_size=2**63 - 1), r"0\.weight: group_size must be from 1"),
        (entry(rotation=-64), r"0\.weight: rotation must be 0"),
        (entry("_nested", "scale", view_as_float="float16"), r"0\.weight\.scale: .* never viewed as floats"),
        (entry("_nested", "scale", shape=[64, 8]), r"0\.weight: "),
        (entry("_nested", "scale", rotation=2), r"0\.weight\.scale: .*axis 0"),
        (entry("_nested", "zero_point", nbits=4), r"0\.weight: "),
        (nest_again, r"0\.weight\.scale: metadata is nested more than once"),
    ],
)  # fmt: skip
def test_metadata_that_is_wrong_is_named(saved: Path, change: Callable[[dict[str, str]], None], match: str) -> None:
    change_metadata(saved, change)
    model = layers()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=match):
        load_model(model, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_unknown_keys_are_let_through(saved: Path) -> None:
    change_metadata(saved, ours(note="of a later minor version"))
    load_model(layers(), saved)


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        ("0._weight_scale_qdata", torch.zeros(64, 5, dtype=torch.uint8), r"0\.weight: qdata must be"),
        ("0._weight_scale_scale", torch.full((1, 4), torch.nan), "'0._weight_scale_scale' holds NaN or Inf"),
        ("0._weight_scale_scale", torch.zeros(1, 4, dtype=torch.float8_e4m3fn), r"0\.weight: scale must be"),
        ("0._weight_qdata", torch.zeros((), dtype=torch.uint8), "must be rows of uint8"),
        ("0._weight_qdata", torch.zeros(64, 8), "must be rows of uint8"),
        ("0._weight_qdata", torch.zeros(32, 32, dtype=torch.uint8), r"0\.weight: qdata must be \[64, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, key: str, tensor: torch.Tensor, match: str) -> None:
    with safe_open(saved, "pt") as f:
        metadata = f.metadata()
    save_file({**load_file(saved), key: tensor}, saved, metadata=metadata)
    with pytest.raises(CheckpointError, match=match):
        load_model(layers(), saved)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a" * 5000], "File name too long"),
        (["a\x00b"], "is missing"),
        (["../m.safetensors"], "plain file names"),
        ([["m.safetensors"]], "is no index"),
        (["m.safetensors", 5], "is no index"),
    ],
)
def test_shard_names_that_are_no_names(saved: Path, names: list[Any], match: str) -> None:
    index = saved.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))
    for read in (checkpoint_files, inspect_checkpoint, lambda path: load_model(layers(), path)):
        with pytest.raises(CheckpointError, match=match):
            read(index)


@pytest.mark.parametrize(
    ("content", "match"), [(DEEP, "nested too deeply"), ("{", "not valid JSON"), ("[]", "no index")]
)
def test_an_index_that_is_none(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{match}"):
        checkpoint_files(tmp_path)


def test_settings_of_a_gptq_model_that_are_nested_too_deeply(tmp_path: Path) -> None:
    save_file({"0.qweight": torch.zeros(8, 64, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": ' + DEEP)
    with pytest.raises(CheckpointError, match=r"config\.json: .*nested too deeply"):
        load_model(layers(), tmp_path)


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="too long"):
        load_model(layers(), tmp_path / ("a" * 5000))


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = layers()
    quantize_(model, HqqConfig(4, 64))
    model[0].weight.scale[3, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"0\.weight: '0\._weight_scale' holds NaN or Inf"):
        save_model(model, tmp_path)
    model[0].weight = nn.Parameter(
        HQQTensor.from_hp(torch.randn(64, 64), HqqConfig(4, 64)).to(torch.float8_e5m2), False
    )
    with pytest.raises(CheckpointError, match=r"0\.weight: dtype 'float8_e5m2'"):
        save_model(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_float64_weights_and_those_that_share_data_are_saved(tmp_path: Path) -> None:
    """Weights that share codes but differ otherwise are no tied weights, and safetensors refuses shared memory."""
    w = HQQTensor.from_hp(torch.randn(256, 64), HqqConfig(4, 64, axis=0))
    weights = {"w": w, "wide": w.double(), "turned": w.t(), "low": w[:128], "high": w[128:], "tied": w}
    save_model(nn.ParameterDict({n: nn.Parameter(t, requires_grad=False) for n, t in weights.items()}), tmp_path)
    empty = nn.ParameterDict({n: nn.Parameter(torch.empty(t.shape, device="meta"), False) for n, t in weights.items()})
    assert load_model(empty, tmp_path) == ([], [])
    for name, want in weights.items():
        assert torch.equal(empty[name], want) and empty[name].dtype == want.dtype, name
    assert len(inspect_checkpoint(tmp_path).tensors) == 5


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    code = """
        import resource, sys
        import torch
        from torch import nn
        from hqqtensor import save_model
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            save_model(nn.Linear(1024, 1024), sys.argv[1] + "/m.safetensors")
        except OSError as error:
            print(type(error).__name__, error.errno, error.filename)
    """
    run = run_fresh(code, tmp_path)
    assert run.stdout.split() == ["OSError", str(errno.EFBIG), str(tmp_path / "m.safetensors")], run.stderr
    assert not any(tmp_path.iterdir())
