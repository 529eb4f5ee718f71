"""What transformers' tests/quantization/torchao_integration/test_torchao.py asks, with our config in TorchAoConfig.

A test is named after its counterpart there (docs/transformers.md lists them); the models are doclm and a tiny Mixtral.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from doclm_models import DOCLM, IDS, load, same
from torch import nn
from torchao.quantization import FqnToConfig

from hqqtensor import HqqConfig, HQQTensor, dequantize_
from hqqtensor.integrations.transformers.quantizer import HQQTensorHfQuantizer

EIGHT, THREE = HqqConfig(8, 64), HqqConfig(3, 64)
Q = "model.layers.{}.self_attn.q_proj"
K = "model.layers.{}.self_attn.k_proj"
ANY_Q = r"re:model\.layers\..+\.self_attn\.q_proj"


def through_torchao(config: Any, **options: Any) -> Any:
    torchao = {name: options.pop(name) for name in list(options) if name.startswith(("include", "modules"))}
    return load(quantization_config=tf.TorchAoConfig(config, **torchao), device_map="cpu", **options)


def check_generates(model: Any) -> None:
    """Ten more tokens, and the logits of the model that it stands for."""
    assert model.generate(IDS, max_new_tokens=10, do_sample=False).shape == (1, IDS.shape[1] + 10)
    dense = copy.deepcopy(model)
    dequantize_(dense)
    with torch.no_grad():
        got, want = model(IDS).logits.float(), dense(IDS).logits.float()
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_to_dict() -> None:
    entry = tf.TorchAoConfig(HqqConfig(4, 32)).to_dict()
    assert entry["quant_method"] == "torchao" and "quant_type" in entry


def test_repr() -> None:
    assert "HqqConfig" in repr(tf.TorchAoConfig(HqqConfig(4, 8), modules_to_not_convert=["conv"]))


def test_json_serializable() -> None:
    config = tf.TorchAoConfig(HqqConfig(4, 32, scale_dtype=torch.float16))
    text = config.to_json_string(use_diff=False)
    assert json.loads(text)["quant_type"]["default"]["_data"]["group_size"] == 32
    again = tf.TorchAoConfig.from_dict(json.loads(text))
    assert again.quant_type == config.quant_type


@pytest.mark.parametrize("skip", [False, True])
def test_param_needs_quantization_moe_expert(skip: bool) -> None:
    """There only some packings hold 3-D experts; ours all do, and skip_modules leaves them alone."""
    config = tf.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.MixtralForCausalLM(config)
    skipped = ["lm_head", "experts"] if skip else ["lm_head"]
    quantizer = HQQTensorHfQuantizer(HqqConfig(4, 32, skip_modules=skipped), pre_quantized=False)
    quantizer.preprocess_model(model=model)
    needed = {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}
    layer = "model.layers.0."
    assert f"{layer}self_attn.q_proj.weight" in needed and f"{layer}input_layernorm.weight" not in needed
    experts = {f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"}
    assert needed & experts == (set() if skip else experts) and f"{layer}mlp.gate.weight" not in needed


def test_int4wo_quant() -> None:
    model = through_torchao(HqqConfig(4, 64), dtype=torch.bfloat16)
    assert isinstance(model.model.layers[0].self_attn.v_proj.weight, HQQTensor)
    check_generates(model)


def test_int8_dynamic_activation_int8_weight_quant() -> None:
    model = through_torchao(HqqConfig(8, 64, activation="int8"), dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.v_proj.weight.activation == "int8"
    check_generates(model)


def test_include_input_output_embeddings() -> None:
    config = FqnToConfig({"_default": None, "model.embed_tokens": EIGHT, "lm_head": EIGHT})
    model = through_torchao(config, include_input_output_embeddings=True)
    assert isinstance(model.model.embed_tokens.weight, HQQTensor) and isinstance(model.lm_head.weight, HQQTensor)
    assert type(model.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    check_generates(model)


# name of the test there, what FqnToConfig gets, bits that layers then have (None: dense)
BY_NAME: dict[str, tuple[dict[str, Any], dict[str, int | None]]] = {
    "per_module_config_skip": ({"_default": EIGHT, Q.format(0): None}, {Q.format(0): None, Q.format(1): 8}),
    "regex_basic": ({"_default": EIGHT, ANY_Q: None}, {Q.format(0): None, K.format(0): 8}),
    "regex_fullmatch": (
        {r"re:model\.layers\.+\.self_attn\.q_pro": EIGHT, Q.format(3): THREE}, {Q.format(3): 3, Q.format(1): None},
    ),
    "module_regex_precedence": (
        {ANY_Q: None, Q.format(3): THREE, "_default": EIGHT}, {Q.format(3): 3, Q.format(1): None, K.format(1): 8},
    ),
    "regex_precedence": (
        {f"{ANY_Q}.weight": None, f"{Q.format(3)}.weight": THREE, "_default": EIGHT},
        {Q.format(3): 3, Q.format(1): None, K.format(1): 8},
    ),
    "param_over_module_regex_precedence": (
        {f"{ANY_Q}.weight": None, ANY_Q: THREE, "_default": EIGHT}, {Q.format(1): None, K.format(1): 8},
    ),
    "param_over_module_precedence": (
        {f"{Q.format(3)}.weight": None, Q.format(3): THREE, "_default": EIGHT}, {Q.format(3): None, K.format(3): 8},
    ),
    "exact_over_regex_precedence": (
        {f"{Q.format(3)}.weight": None, Q.format(1): EIGHT, f"{ANY_Q}.weight": THREE},
        {Q.format(3): None, Q.format(1): 8, Q.format(2): 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_fqn_to_config(name: str) -> None:
    by_name, bits = BY_NAME[name]
    model = through_torchao(FqnToConfig(by_name))
    found = {layer: getattr(model.get_submodule(layer).weight, "nbits", None) for layer in bits}
    assert found == bits
    check_generates(model)


def test_fqn_to_config_non_weight_param(tmp_path: Path) -> None:
    config = tf.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    by_name = FqnToConfig({"re:.*gate_up_proj": THREE, experts: None, "_default": EIGHT})
    model = tf.MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=tf.TorchAoConfig(by_name))
    first, second = model.model.layers
    assert second.mlp.experts.gate_up_proj.nbits == 3 and type(first.mlp.experts.gate_up_proj) is nn.Parameter
    assert second.self_attn.q_proj.weight.nbits == 8
    check_generates(model)


def test_compute_module_sizes() -> None:
    """Of our own quantizer; that of TorchAoConfig takes a byte a weight for configs whose name has no number."""
    from transformers.integrations.accelerate import compute_module_sizes

    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(DOCLM), dtype=torch.bfloat16)
    dense, _ = compute_module_sizes(model, only_modules=False)
    quantizer = HQQTensorHfQuantizer(HqqConfig(4, 64), pre_quantized=False)
    quantizer.preprocess_model(model=model)
    sizes, _ = compute_module_sizes(model, quantizer, only_modules=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            share = 1 if name == "lm_head" else 4.5 / 16  # scales and zero points counted
            assert sizes[f"{name}.weight"] == dense[f"{name}.weight"] * share
    actual = load(quantization_config=HqqConfig(4, 64), dtype=torch.bfloat16)
    nbytes = sum(p.nbytes for p in actual.parameters()) + sum(b.nbytes for b in actual.buffers())
    assert sizes[""] == nbytes


def test_int4wo_offload(tmp_path: Path) -> None:
    """There three layers stay on the cpu beside an accelerator; here they stay on the disk beside the cpu."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(5)}
    model = through_torchao(HqqConfig(4, 64))
    own = load(quantization_config=HqqConfig(4, 64), device_map=places, offload_folder=tmp_path)
    assert own.model.layers[4].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(own(IDS).logits, model(IDS).logits)


SERIALIZED: dict[str, dict[str, Any]] = {
    "Int8WeightOnlyConfig": {"nbits": 8},
    "Int8DynamicActivationInt8WeightConfig": {"nbits": 8, "activation": "int8"},
    "Float8WeightOnlyConfig": {"nbits": 8, "format": "fp8"},
    "Int4WeightOnlyConfig": {"nbits": 4},
    "Int8DynamicActivationIntxWeightConfig": {"nbits": 3, "activation": "int8"},
    "IntxWeightOnlyConfig": {"nbits": 5},
    "NVFP4DynamicActivationNVFP4WeightConfig": {"nbits": 4, "format": "fp4", "group_size": 16},
}


@pytest.mark.parametrize("name", SERIALIZED)
def test_serialization_cpu(name: str, tmp_path: Path) -> None:
    model = through_torchao(HqqConfig(**{"group_size": 64, **SERIALIZED[name]}))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device_map="cpu")
    assert same(model, again)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), again.generate(IDS, **options))
