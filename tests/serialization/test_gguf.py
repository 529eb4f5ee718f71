"""GGUF files, written and dequantized by the gguf package."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hqqtensor import HQQTensor, load_model
from hqqtensor.cli import main
from hqqtensor.serialization.gguf_blocks import read_tensor
from hqqtensor.serialization.gguf_file import BLOCKS, open_gguf
from hqqtensor.serialization.layout import CheckpointError

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

Types = gguf.GGMLQuantizationType
EXACT = ("Q4_0", "Q5_0", "Q8_0", "Q6_K")
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def write(path: Path, tensors: dict[str, tuple[Any, str]], metadata: dict[str, Any] | None = None) -> Path:
    """A file of {name: (numpy array or raw blocks, type)}."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=Types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Any:
    """Random blocks of a type: any bytes as codes, normal scales."""
    rng = np.random.default_rng(seed)
    _, block, size = BLOCKS[kind]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    places = {"Q6_K": (208,)}.get(kind, (0, 2) if kind in WITH_MINIMUM else (0,))
    for place in places:
        halves = rng.standard_normal((rows, columns // block, 1)).astype(np.float16)
        raw[:, :, place : place + 2] = halves.view(np.uint8)
    return raw.reshape(rows, -1)


def read(path: Path, name: str = "a") -> Any:
    file = open_gguf(path)
    return read_tensor(file, file.tensors[name])


def theirs(data: Any, kind: str) -> Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, Types[kind])))


def close(got: Tensor, data: Any, kind: str, scale: Tensor) -> bool:
    """Within what three float32 roundings of a block's largest number leave: 3 * 2**-24."""
    want = theirs(data, kind)
    largest = want.view(want.shape[0], -1, 32).abs().amax(-1) + 31 * scale.float().abs()
    return bool(((got - want).view(want.shape[0], -1, 32).abs() <= 3 * 2**-24 * largest[..., None]).all())


@pytest.mark.parametrize("kind", EXACT)
def test_symmetric_types_are_read_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    data = blocks(kind, 24, 512)
    got = read(write(tmp_path / "a.gguf", {"a": (data, kind)}))
    assert got.nbits == int(kind[1]) and got.group_size == (16 if kind == "Q6_K" else 32)
    assert got.scale.dtype == (torch.float32 if kind == "Q6_K" else torch.float16)
    assert torch.equal(got.dequantize(), theirs(data, kind))


@pytest.mark.parametrize("kind", WITH_MINIMUM)
def test_types_with_a_minimum_are_read_within_float32_rounding(kind: str, tmp_path: Path) -> None:
    data = blocks(kind, 24, 512)
    got = read(write(tmp_path / "a.gguf", {"a": (data, kind)}))
    assert (got.nbits, got.group_size, got.scale.dtype) == (int(kind[1]), 32, torch.float32)
    assert close(got.dequantize(), data, kind, got.scale)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]), st.integers(1, 6), st.integers(1, 6), st.integers(0))
def test_what_the_gguf_package_quantizes_is_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: int, cols: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, 32 * cols)).astype(np.float32)
    weight[0, :32] = 0.0  # a block of d == 0 and m == 0
    weight[-1, -32:] = 0.3  # a block of d == 0 and m != 0 where a type has a minimum
    data = gguf.quants.quantize(weight, Types[kind])
    got = read(write(tmp_path_factory.mktemp("g") / "a.gguf", {"a": (data, kind)}))
    if kind in EXACT:
        assert torch.equal(got.dequantize(), theirs(data, kind))
    else:
        assert close(got.dequantize(), data, kind, got.scale)
    assert torch.equal(got.dequantize()[-1, -32:], theirs(data, kind)[-1, -32:])


def test_zero_points_that_float16_holds_stay_there_and_are_exact(tmp_path: Path) -> None:
    data = blocks("Q4_1", 8, 64)
    view = data.reshape(8, 2, 20)
    scale = view[:, :, :2].copy().view(np.float16)
    view[:, :, 2:4] = (scale * np.float16(-7)).view(np.uint8)
    scale[:] = 0.5
    view[:, :, :2], view[:, :, 2:4] = scale.view(np.uint8), (scale * np.float16(-7)).view(np.uint8)
    got = read(write(tmp_path / "a.gguf", {"a": (data, "Q4_1")}))
    assert got.zero_point.dtype == torch.float16 and torch.equal(got.dequantize(), theirs(data, "Q4_1"))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_dense_tensors_keep_their_dtype_and_numbers(kind: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    got = read(write(tmp_path / "a.gguf", {"a": (gguf.quants.quantize(weight, Types[kind]), kind)}))
    assert got.dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert torch.equal(got.float(), torch.from_numpy(weight).to(got.dtype).float())


# strangers' files


def header(body: bytes, tensors: int = 0, entries: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(shape: tuple[int, ...] = (32,), kind: int = 2, offset: int = 0, name: str = "a") -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"GGUF", "cut short"),
        (header(b"", magic=b"GGML"), "is no GGUF file"),
        (header(b"", version=1), "version 1 is not read"),
        (header(b"", version=3 << 24), "is not read"),
        (header(b"", tensors=2**60), "claims 1152921504606846976 tensors"),
        (header(struct.pack("<Q", 2**63), entries=1), "cut short"),
        (header(text("a") + struct.pack("<IIQ", 9, 0, 2**60), entries=1), "array claims 1152921504606846976 entries"),
        (header(text("a") + struct.pack("<IIQ", 9, 11, 9) + b"1" * 9, entries=1), "cut short"),
        (header(text("a") + struct.pack("<IIQIQIQIQ", 9, 9, 1, 9, 1, 9, 1, 9, 1), entries=1), "unknown type 9"),
        (header(text("a") + struct.pack("<I", 77), entries=1), "unknown type 77"),
        (header((text("a") + struct.pack("<II", 4, 1)) * 2, entries=2), "'a' is there twice"),
        (header(text("split.count") + struct.pack("<IH", 2, 3), entries=1), "one part of several"),
        (header(text("general.alignment") + struct.pack("<II", 4, 0), entries=1), r"bad general\.alignment 0"),
        (header(info(kind=10), tensors=1) + bytes(99), "'a' is of type Q2_K; F32, F16, BF16, Q4_0"),
        (header(info(kind=99), tensors=1) + bytes(99), "'a' is of type number 99"),
        (header(info((31,)), tensors=1) + bytes(99), r"'a' of type Q4_0 has shape \[31\]"),
        (header(info((32, 0)), tensors=1) + bytes(99), r"has shape \[0, 32\]"),
        (header(info((32, 2**58)), tensors=1) + bytes(99), "has shape"),
        (header(info((32, 2**30, 2**30)), tensors=1) + bytes(99), "bytes, in a file of"),
        (header(info((32,) * 5), tensors=1) + bytes(99), "claims 5 dimensions"),
        (header(info(offset=2**62), tensors=1) + bytes(99), "lies at"),
        (header(info(offset=8), tensors=1) + bytes(99), "lies at"),
        (header(info(), tensors=1) + bytes(16), "lies at"),
        (header(info() * 2, tensors=2) + bytes(99), "'a' is there twice"),
    ],
)
def test_hostile_files_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{match}"):
        open_gguf(tmp_path / "a.gguf")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_no_damage_to_a_header_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    write(path, {"a": (blocks("Q4_0", 2, 64), "Q4_0")}, {"llama.x": [1, 2], "y": "text"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = open_gguf(path)
        for tensor in file.tensors.values():
            read_tensor(file, tensor)
    except CheckpointError:
        pass


def test_scales_that_are_not_finite_and_quantized_vectors_are_refused(tmp_path: Path) -> None:
    data = blocks("Q4_1", 2, 64)
    data[0, 2:4] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match="a: its scales hold NaN or Inf"):
        read(write(tmp_path / "a.gguf", {"a": (data, "Q4_1")}))
    with pytest.raises(CheckpointError, match=r"a: a quantized tensor of shape \[64\] is no matrix"):
        read(write(tmp_path / "b.gguf", {"a": (blocks("Q4_0", 1, 64)[0], "Q4_0")}))


# whole models


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"q_proj": 4, "k_proj": 2}


def interleaved(array: Any, heads: int) -> Any:
    """Rows as llama.cpp's converter orders them for this architecture."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def metadata(**changes: Any) -> dict[str, Any]:
    own = {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 5000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 16,
    }  # fmt: skip
    ids = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)]}
    both = {f"llama.{key}": value for key, value in own.items()} | ids | changes
    return {key: value for key, value in both.items() if value is not None}


def make(
    directory: Path, kinds: dict[str, str], tied: bool = False, bias: bool = False, **changes: Any
) -> tuple[Path, Path]:
    """A tiny Llama as ``model.gguf`` (a type by part of a name, else Q4_0), and dense with the file's exact weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=bias, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tensors: dict[str, tuple[Any, str]] = {}
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.1)
        module, _, leaf = name.rpartition(".")
        kind = next((kind for part, kind in kinds.items() if part in name), "Q4_0") if parameter.ndim == 2 else "F32"
        data = gguf.quants.quantize(parameter.detach().numpy(), Types[kind])
        parameter.data = theirs(data, kind).clone()
        data = interleaved(data, HEADS[module[-6:]]) if module[-6:] in HEADS else data
        for theirs_, ours in NAMES.items():
            if module == theirs_ or module.endswith(f".{theirs_}"):
                block = f"blk.{module.split('.')[2]}." if ".layers." in module else ""
                tensors[f"{block}{ours}.{leaf}"] = (np.ascontiguousarray(data), kind)
    assert len(tensors) == len(list(model.named_parameters()))
    model.save_pretrained(directory / "dense")
    return write(directory / "model.gguf", tensors, metadata(**changes)), directory / "dense"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def check(model: nn.Module, dense: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(dense)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert all(isinstance(p, HQQTensor) for p in weights.values()) and len(weights) in (15, 16)
    for name, want in plain.state_dict().items():
        got = model.state_dict()[name]
        value = got.dequantize() if isinstance(got, HQQTensor) else got
        assert torch.allclose(value, want, rtol=0, atol=1e-7), name
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


CASES = {"q4_0": {}, "mixed": {"v_proj": "Q4_1", "down": "Q8_0", "embed": "Q5_1", "lm_head": "Q8_0"}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_convert_makes_a_model_from_the_file_alone(case: str, tied: bool, tmp_path: Path) -> None:
    file, dense = make(tmp_path, CASES[case], tied, bias=tied)
    assert main(["convert", str(file), str(tmp_path / "out"), "--json"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    want = AutoModelForCausalLM.from_pretrained(dense).config
    same = ("vocab_size", "hidden_size", "head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings")
    assert all(getattr(model.config, key) == getattr(want, key) for key in (*same, "max_position_embeddings"))
    assert model.config.bos_token_id == 3 and model.config.eos_token_id is None
    check(model, dense)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_load_model_reads_a_file(tmp_path: Path) -> None:
    file, dense = make(tmp_path, {})
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_model(model, file)
    check(model, dense)


def test_convert_takes_config_and_tokenizer_from_a_directory(tmp_path: Path) -> None:
    file, dense = make(tmp_path, {}, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    (dense / "tokenizer.json").write_text("{}")
    settings = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 77}))
    assert main(["convert", str(file), str(tmp_path / "out"), "--config", str(dense)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.max_position_embeddings == 77 and (tmp_path / "out" / "tokenizer.json").is_file()
    check(model, dense)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not read"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        (
            {"llama.attention.head_count": None},
            r"llama\.attention\.head_count must be a positive whole number, got None",
        ),
        ({"llama.attention.head_count": 24}, "do not divide into 24 heads"),
        ({"llama.rope.scaling.type": "linear"}, "scales rotary frequencies.*config"),
        ({"llama.rope.dimension_count": 8}, "only some of the 16 dimensions"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "must be a positive number"),
    ],
)
def test_what_a_file_alone_does_not_say_is_named(
    changes: dict[str, Any], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "blk.0.attn_q.weight": (blocks("Q4_0", 64, 64), "Q4_0"),
        "token_embd.weight": (blocks("Q4_0", 64, 64), "Q4_0"),
    }
    architecture = changes.pop("general.architecture", None)
    file = write(tmp_path / "model.gguf", names, metadata(**changes, **{"llama.attention.key_length": 16}))
    if architecture:
        file.write_bytes(file.read_bytes().replace(text("llama"), text(architecture), 1))
    # With --config the model of scaled frequencies can be converted; the others cannot.
    assert main(["convert", str(file), str(tmp_path / "out")]) == (2 if "scales" in match else 1)
    assert re.search(match, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_tensors_that_the_architecture_has_not_are_named(tmp_path: Path) -> None:
    for name in ("blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "output.scale", "a"):
        file = write(tmp_path / "a.gguf", {name: (blocks("Q4_0", 64, 64), "Q4_0")}, metadata())
        with pytest.raises(CheckpointError, match=rf"tensor '{name}' has no place"):
            load_model(nn.Linear(2, 2), file)
