"""What streaming writes equals what ``quantize_`` and ``save_model`` give for the model opened whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streaming_files import assert_equal, files, quantize

from hqqtensor import HQQTensor
from hqqtensor.cli import model_dir
from hqqtensor.streaming import plan as plans

MOE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def mixtral(path: Path) -> Path:
    config = transformers.MixtralConfig(**MOE, intermediate_size=64, num_local_experts=4)
    save(transformers.MixtralForCausalLM(config).to(torch.bfloat16), path)
    assert any(".experts.3.w2." in name for name in load_file(path / "model.safetensors"))
    return path


def qwen_moe(path: Path) -> Path:
    config = transformers.Qwen3MoeConfig(**MOE, head_dim=32, moe_intermediate_size=64, num_experts=4)
    save(transformers.Qwen3MoeForCausalLM(config), path)
    assert any(".experts.3.down_proj." in name for name in load_file(path / "model.safetensors"))
    return path


def old_names(path: Path) -> Path:
    """A BERT whose layer norms are called as they were in 2018, with a buffer that models no longer have."""
    config = transformers.BertConfig(
        vocab_size=1100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    save(transformers.BertModel(config), path)
    tensors = load_file(path / "model.safetensors")
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    assert set(renamed) != set(tensors)
    renamed["embeddings.position_ids"] = torch.arange(32)
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    return path


def base_in_head(path: Path) -> Path:
    """The checkpoint of a LlamaModel, whose config names a class with a (tied) head."""
    config = transformers.LlamaConfig(**MOE, intermediate_size=64, tie_word_embeddings=True)
    save(transformers.LlamaModel(config).half(), path)
    return set_architecture(path, "LlamaForCausalLM")


def head_in_base(path: Path) -> Path:
    config = transformers.LlamaConfig(**MOE, intermediate_size=64, tie_word_embeddings=False)
    save(transformers.LlamaForCausalLM(config), path)
    return set_architecture(path, "LlamaModel")


def conv1d(path: Path) -> Path:
    """GPT-2: weights are stored transposed, attention biases are buffers."""
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    return save(transformers.GPT2LMHeadModel(config), path)


def set_architecture(path: Path, name: str) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    return path


CASES = {
    "mixtral": (mixtral, ["--bits", 4]),
    "mixtral, one scale a group": (mixtral, ["--bits", 3, "--group-size", 32, "--skip", "lm_head"]),
    "qwen3 moe": (qwen_moe, ["--bits", 2, "--embeddings", "none"]),
    "older names": (old_names, ["--bits", 5]),
    "base model in a head's class": (base_in_head, []),
    "head in a base model's class": (head_in_base, ["--quant-metadata"]),
    "transposed weights": (conv1d, ["--group-size", 16, "--axis", 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_streaming_gives_the_same_bits(case: str, tmp_path: Path, quantize_whole, capsys) -> None:
    make, options = CASES[case]
    torch.manual_seed(0)
    source = make(tmp_path / "source")
    quantize_whole(source, tmp_path / "want", *options)
    assert quantize(source, tmp_path / "got", *options, "--json") == 0
    assert "opened whole" not in capsys.readouterr().err
    assert_equal(tmp_path / "got", tmp_path / "want")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("says_dtype", [True, False])
def test_each_dtype_gives_the_same_bits(dtype, says_dtype, tmp_path: Path, llama_config, quantize_whole) -> None:
    torch.manual_seed(1)
    source = save(transformers.LlamaForCausalLM(llama_config).to(dtype), tmp_path / "source")
    if not says_dtype:
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    quantize_whole(source, tmp_path / "want")
    assert quantize(source, tmp_path / "got", "--json") == 0
    assert_equal(tmp_path / "got", tmp_path / "want")


def test_shards_are_cut_where_save_model_cuts_them(dense: Path, tmp_path: Path, quantize_whole) -> None:
    quantize_whole(dense, tmp_path / "want", "--max-shard-size", "20KB")
    assert quantize(dense, tmp_path / "got", "--max-shard-size", "20KB", "--json") == 0
    assert len(list((tmp_path / "got").glob("*.safetensors"))) == 3
    assert_equal(tmp_path / "got", tmp_path / "want")
    model = model_dir.open_quantized(tmp_path / "got")
    assert model.lm_head.weight is model.model.embed_tokens.weight and isinstance(model.lm_head.weight, HQQTensor)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "got")
    assert torch.equal(loaded.lm_head.weight.qdata, model.lm_head.weight.qdata)


def with_weights(dense: Path, path: Path, change: dict[str, float], rows: slice) -> Path:
    """A copy of the model in one file in which some rows of some tensors are multiplied."""
    model = transformers.LlamaForCausalLM.from_pretrained(dense).float()
    for name, factor in change.items():
        model.get_parameter(name).data[rows] *= factor
    return save(model, path)


@pytest.mark.parametrize("pieces", [True, False])
def test_scales_that_float16_does_not_hold_become_float32(
    pieces: bool, dense: Path, tmp_path: Path, quantize_whole, monkeypatch
) -> None:
    change = {"model.embed_tokens.weight": 1e-6, "model.layers.1.mlp.up_proj.weight": 1e9}
    source = with_weights(dense, tmp_path / "source", change, slice(90, 95))
    options = ["--group-size", 32, "--max-shard-size", "60KB"]
    quantize_whole(source, tmp_path / "want", *options)
    if pieces:
        monkeypatch.setattr(plans, "PIECE_BYTES", 16 * 64 * 4)
    assert quantize(source, tmp_path / "got", *options, "--json") == 0
    want, got = (model_dir.open_quantized(tmp_path / name) for name in ("want", "got"))
    for (name, a), (_, b) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert type(a) is type(b) and torch.equal(a, b), name
        if isinstance(a, HQQTensor):
            assert a.scale.dtype == b.scale.dtype and torch.equal(a.qdata, b.qdata), name
    assert got.model.embed_tokens.weight.scale.dtype == torch.float32
    assert got.model.layers[1].mlp.up_proj.weight.scale.dtype == torch.float32
    assert got.model.layers[0].mlp.up_proj.weight.scale.dtype == torch.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got", "source", "want"]


def test_large_matrices_go_in_pieces_of_rows(dense: Path, tmp_path: Path, quantize_whole, monkeypatch) -> None:
    options = ["--layers", "mlp=none", "self_attn=8/16"]
    quantize_whole(dense, tmp_path / "want", *options)
    monkeypatch.setattr(plans, "PIECE_BYTES", 7 * 64 * 2)
    assert quantize(dense, tmp_path / "got", *options, "--json") == 0
    assert_equal(tmp_path / "got", tmp_path / "want")


def test_what_cannot_be_streamed_is_opened_whole_and_says_so(tmp_path: Path, llama_config, capsys) -> None:
    model = transformers.LlamaForCausalLM(llama_config)
    source = save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert quantize(source, tmp_path / "out") == 0
    assert f"{source} is opened whole, as it has no model.safetensors" in capsys.readouterr().err
    save_file(tensors | {"lm_head.weight": torch.ones(256, 64)}, source / "model.safetensors", {"format": "pt"})
    assert quantize(source, tmp_path / "untied") == 0
    assert "lm_head.weight should be tied and differ" in capsys.readouterr().err
    assert not (set(files(tmp_path / "out")) & {"pytorch_model.bin"})


def test_everything_small_is_carried_over(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    (source / "1_Pooling").mkdir()
    kept = {"README.md": "#", "modeling_x.py": "x = 1", "1_Pooling/config.json": "{}", "vocab.txt": "a"}
    for name, text in {**kept, "optimizer.pt": "no", ".hidden": "no", "other.bin": "no"}.items():
        (source / name).write_text(text)
    (source / "modules.json").write_text('[{"path": "", "type": "a"}, {"path": "1_Pooling"}, {"path": "../dense"}]')
    assert quantize(source, tmp_path / "out", "--json") == 0
    got = files(tmp_path / "out")
    assert {name: got[name].decode() for name in kept} == kept
    assert set(got) == {*kept, "modules.json", "config.json", "generation_config.json", "model.safetensors"}
