"""What transformers' tests/quantization/hqq/test_hqq.py asks of its HQQ integration, asked of ours on a CPU.

A test is named after its counterpart there (docs/transformers.md lists them); the models are doclm and a tiny OPT.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from doclm_models import load
from torch import nn

from hqqtensor import HQQTensor

pytestmark = pytest.mark.usefixtures("serves_hqq")
EIGHT = {"nbits": 8, "group_size": 64}


def check_layer(layer: nn.Linear, dtype: torch.dtype) -> None:
    """The layer computes, in ``dtype``, with what its weight stands for."""
    weight = layer.weight
    assert type(layer) is nn.Linear and isinstance(weight, HQQTensor) and weight.dtype == dtype
    x = torch.randn(1, 32, layer.in_features, dtype=dtype) / 10
    with torch.no_grad():
        bias = None if layer.bias is None else layer.bias.float()
        got, want = layer(x), nn.functional.linear(x.float(), weight.dequantize(torch.float32), bias)
    assert got.shape == (1, 32, layer.out_features) and got.dtype == dtype
    assert (got - want).abs().max() < 8 * torch.finfo(dtype).eps * want.abs().max()


def check_forward(model: Any) -> None:
    with torch.no_grad():
        logits = model(torch.zeros(1, 32, dtype=torch.int32)).logits
    assert logits.shape[:2] == (1, 32) and bool(logits.isfinite().all())


def check_reloaded(model: Any, path: Path, dtype: torch.dtype = torch.float16) -> None:
    ids = torch.zeros(1, 8, dtype=torch.int32)
    model.save_pretrained(path)
    again = tf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose linear layers have biases."""
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=64, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("opt")
    tf.OPTForCausalLM(config).to(torch.float16).save_pretrained(path)
    return path


def test_to_dict() -> None:
    config = tf.HqqConfig()
    assert config.to_dict()["quant_config"] == config.quant_config
    assert config.quant_config["weight_quant_params"]["nbits"] == 4


def test_fp16_quantized_model() -> None:
    model = load(dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(**EIGHT))
    check_layer(model.model.layers[0].self_attn.v_proj, torch.float16)
    check_forward(model)


def test_quantized_model_to_new_device_and_new_dtype() -> None:
    model = load(dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(**EIGHT))
    codes = model.model.layers[0].self_attn.v_proj.weight.qdata.clone()
    model.to("cpu", torch.bfloat16)
    check_layer(model.model.layers[0].self_attn.v_proj, torch.bfloat16)
    check_forward(model)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight.qdata, codes)
    assert model.to("meta").model.layers[0].self_attn.v_proj.weight.qdata.device.type == "meta"


def test_quantized_model_fake_weight_dtype() -> None:
    # There the layer has no weight and a stand-in is put in its place; here it is the weight.
    model = load(dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(**EIGHT))
    assert model.model.layers[0].self_attn.v_proj.weight.dtype == torch.float16


def test_fp16_quantized_model_with_offloading() -> None:
    four, three = {"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": 32, "offload_meta": True}
    tags = {f"self_attn.{name}_proj": four for name in "qkvo"}
    tags |= {f"mlp.{name}_proj": three for name in ("gate", "up", "down")}
    model = load(dtype=torch.bfloat16, device_map="cpu", quantization_config=tf.HqqConfig(dynamic_config=tags))
    check_layer(model.model.layers[0].self_attn.v_proj, torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.nbits == 3
    check_forward(model)


def test_bias_fp16_quantized_model(opt: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        opt, dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(**EIGHT)
    )
    layer = model.model.decoder.layers[0].self_attn.v_proj
    assert layer.bias is not None
    check_layer(layer, torch.float16)
    check_forward(model)


def test_bias_save_and_load_quantized_model(opt: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        opt, dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(**EIGHT)
    )
    check_reloaded(model, tmp_path)


def test_model_serialization(tmp_path: Path) -> None:
    check_reloaded(
        load(dtype=torch.float16, device_map="cpu", quantization_config=tf.HqqConfig(nbits=4, group_size=64)), tmp_path
    )


def test_model_serialization_dynamic_quant_with_skip(tmp_path: Path) -> None:
    four, three = {"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": 64}
    tags = {f"self_attn.{name}_proj": four for name in "qkvo"} | {"mlp.gate_proj": three, "mlp.up_proj": three}
    config = tf.HqqConfig(dynamic_config=tags, skip_modules=["lm_head", "down_proj"])
    model = load(dtype=torch.float16, device_map="cpu", quantization_config=config)
    layer = model.model.layers[1]
    assert type(layer.mlp.down_proj.weight) is nn.Parameter
    assert layer.self_attn.v_proj.weight.nbits == 4 and layer.mlp.gate_proj.weight.nbits == 3
    check_reloaded(model, tmp_path)
