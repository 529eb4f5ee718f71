"""Tiny random models of many families: loaded, quantized, saved, loaded again, run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor, quantize_

TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


FAMILIES: dict[str, tuple[Any, type, int]] = {  # config, class, quantized weights a model
    "llama": (lambda: tf.LlamaConfig(**TEXT), tf.LlamaForCausalLM, 14),
    "qwen3": (lambda: tf.Qwen3Config(**TEXT), tf.Qwen3ForCausalLM, 14),
    "gemma": (lambda: tf.GemmaConfig(**TEXT), tf.GemmaForCausalLM, 14),
    "mistral": (lambda: tf.MistralConfig(**TEXT), tf.MistralForCausalLM, 14),
    "phi": (lambda: tf.PhiConfig(**TEXT), tf.PhiForCausalLM, 12),
    "phi3": (lambda: tf.Phi3Config(**TEXT), tf.Phi3ForCausalLM, 8),
    "gpt2": (
        lambda: tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                              eos_token_id=2, pad_token_id=0),
        tf.GPT2LMHeadModel, 8,
    ),
    "mixtral": (lambda: tf.MixtralConfig(**TEXT, **EXPERTS), tf.MixtralForCausalLM, 12),
    "qwen3_moe": (
        lambda: tf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        tf.Qwen3MoeForCausalLM, 12,
    ),
    "gpt_oss": (lambda: tf.GptOssConfig(**TEXT, **EXPERTS), tf.GptOssForCausalLM, 12),
    "bert": (lambda: tf.BertConfig(**TEXT), tf.BertModel, 13),
    "t5": (
        lambda: tf.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
                            decoder_start_token_id=0),
        tf.T5ForConditionalGeneration, 32,
    ),
    "whisper": (
        lambda: tf.WhisperConfig(
            vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        tf.WhisperForConditionalGeneration, 16,
    ),
    "vit": (
        lambda: tf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                             image_size=16, patch_size=8),
        tf.ViTModel, 13,
    ),
}  # fmt: skip
CONFIG = HqqConfig(4, 32)


def inputs(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "whisper":
        return {"input_features": torch.randn(1, 8, 32)}
    return {"input_ids": torch.randint(3, 64, (2, 9))}


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    if model.can_generate():
        out = model.generate(
            **given, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits)
    with torch.no_grad():
        return model(**given).last_hidden_state


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert type(tensor) is type(second[name]) and torch.equal(tensor, second[name]), name


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path, int]:
    config, cls, count = FAMILIES[request.param]
    torch.manual_seed(0)
    cls(config()).save_pretrained(tmp_path / "dense")
    return request.param, cls, tmp_path, count


def test_family_loads_quantized_saves_and_loads_again(family: tuple[str, Any, Path, int]) -> None:
    name, cls, path, count = family
    model, info = cls.from_pretrained(path / "dense", quantization_config=CONFIG, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, HQQTensor)}
    assert len(weights) == count, sorted(weights)
    dense = cls.from_pretrained(path / "dense")
    quantize_(dense, CONFIG)
    same(model, dense)
    model.save_pretrained(path / "quantized")
    again, info = cls.from_pretrained(path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    same(model, again)
    given = inputs(name)
    out = run(model, given)
    # Dense weights lie at other addresses in the file, which may send BLAS and convolutions down other paths.
    torch.testing.assert_close(run(again, given), out, rtol=1e-5, atol=1e-6)
    again.dequantize()
    assert torch.allclose(out, run(again, given), atol=2e-3), (out - run(again, given)).abs().max()


@pytest.mark.parametrize(
    ("family", "tags"),
    [("vit", {"patch_embeddings.projection": {}}), ("whisper", {"conv1": {"group_size": 24}, "encoder.conv2": {}})],
    indirect=["family"],
)
def test_convolutions_are_quantized_where_a_tag_names_them(
    family: tuple[str, Any, Path, int], tags: dict[str, Any]
) -> None:
    name, cls, path, count = family
    config = HqqConfig(4, 32, dynamic_config=tags)
    model = cls.from_pretrained(path / "dense", quantization_config=config)
    kernels = [p for p in model.parameters() if isinstance(p, HQQTensor) and p.row_dims > 1]
    total = sum(isinstance(p, HQQTensor) for p in model.parameters())
    assert len(kernels) == len(tags) and total == count + len(tags)
    model.save_pretrained(path / "quantized")
    again = cls.from_pretrained(path / "quantized")
    same(model, again)
    given = inputs(name)
    out = run(model, given)
    torch.testing.assert_close(run(again, given), out, rtol=1e-5, atol=1e-6)
    again.dequantize()
    assert torch.allclose(out, run(again, given), atol=2e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_run_quantized_in_every_implementation(
    family: tuple[str, Any, Path, int], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cls, path, _ = family
    model = cls.from_pretrained(path / "dense", quantization_config=CONFIG, experts_implementation=implementation)
    dense = cls.from_pretrained(path / "dense", quantization_config=CONFIG, experts_implementation=implementation)
    dense.dequantize()
    # Experts must go through the packed kernels, not through a dense copy of all of them.
    experts = {id(p) for n, p in model.named_parameters() if "experts" in n}
    original = HQQTensor.dequantize

    def watched(self: HQQTensor, *args: Any) -> Tensor:
        assert id(self) not in experts and self.ndim < 3
        return original(self, *args)

    monkeypatch.setattr(HQQTensor, "dequantize", watched)
    given = inputs(name)
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, dense(**given).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "implementation"), [("mixtral", "batched_mm"), ("gpt_oss", "grouped_mm")], indirect=["family"]
)
def test_experts_compile_in_one_graph(family: tuple[str, Any, Path, int], implementation: str) -> None:
    name, cls, path, _ = family
    model = cls.from_pretrained(path / "dense", quantization_config=CONFIG, experts_implementation=implementation)
    given = inputs(name)
    with torch.no_grad():
        want = model(**given, use_cache=False).logits
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(**given, use_cache=False).logits, want, atol=1e-4)
