"""LoRA over quantized expert weights, by peft's ``target_parameters``."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft_training import IDS, logits, train
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor, dequantize_, quantize_
from hqqtensor.integrations.peft.adapted_weight import AdaptedWeight

peft = pytest.importorskip("peft")
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def moe(kind: str, nbits: int = 4, axis: int = 1) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        model: Any = tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=4))
    elif kind == "qwen":
        config = tf.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=64, num_experts=4, head_dim=16)
        model = tf.Qwen3MoeForCausalLM(config)
    else:  # stacks of [E, inputs, outputs]
        model = tf.GptOssForCausalLM(tf.GptOssConfig(**SHAPE, num_local_experts=4, head_dim=16))
    quantize_(model, HqqConfig(nbits, 32, axis=axis))
    return model


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": names, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def experts(model: Any) -> Any:
    return model.get_base_model().model.layers[0].mlp.experts


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [p.qdata.clone() for p in model.parameters() if isinstance(p, HQQTensor)]


@pytest.mark.parametrize(
    "kind, experts_kind, nbits, axis",
    [
        ("qwen", "grouped_mm", 4, 1), ("qwen", "eager", 2, 1), ("qwen", "batched_mm", 8, 1),
        ("mixtral", "grouped_mm", 3, 0), ("gpt_oss", "grouped_mm", 4, 1), ("gpt_oss", "eager", 4, 1),
    ],
)  # fmt: skip
def test_experts_learn_what_they_would_on_dense_weights(kind: str, experts_kind: str, nbits: int, axis: int) -> None:
    quantized = moe(kind, nbits, axis)
    quantized.set_experts_implementation(experts_kind)
    dense = copy.deepcopy(quantized)
    dequantize_(dense)
    models = [adapted(base, use_rslora=nbits == 8) for base in (quantized, dense)]
    before = packed_bytes(models[0])
    losses, want = (train(m) for m in models)
    assert losses[-1] < losses[0] and losses == pytest.approx(want, rel=1e-4)
    assert len(before) > 2 and all(torch.equal(a, b) for a, b in zip(before, packed_bytes(models[0]), strict=True))
    assert isinstance(experts(models[0]).get_base_layer().gate_up_proj, HQQTensor)


def test_adapters_of_experts_save_load_and_switch(tmp_path: Path) -> None:
    model = adapted(moe("qwen"))
    train(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(moe("qwen"), tmp_path)
    assert torch.equal(logits(again), want)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(moe("qwen")))
    again.load_adapter(tmp_path, "second")
    again.base_model.set_adapter(["default", "second"])
    both = logits(again)
    again.base_model.set_adapter("second")
    assert torch.equal(logits(again), want) and not torch.allclose(both, want, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen", "gpt_oss"])
def test_merging_experts_quantizes_again_and_unmerging_is_exact(kind: str) -> None:
    model = adapted(moe(kind, 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    want = logits(model)
    with model.disable_adapter():
        effect = (want - logits(model)).abs().max()
    before = experts(model).get_base_layer().gate_up_proj
    model.merge_adapter(safe_merge=True)
    merged = experts(model).get_base_layer().gate_up_proj
    assert isinstance(merged, HQQTensor) and merged.describe() == before.describe()
    assert 0 < (logits(model) - want).abs().max() < 0.1 * effect
    model.unmerge_adapter()
    assert experts(model).get_base_layer().gate_up_proj is before and torch.equal(logits(model), want)
    plain = model.merge_and_unload()
    assert type(plain.model.layers[0].mlp.experts).__name__.endswith("Experts")
    assert (logits(plain) - want).abs().max() < 0.1 * effect


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted(peft.prepare_model_for_kbit_training(moe("qwen"), checkpointing))
        model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 12 and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_a_parameter_of_a_linear_layer_can_be_named() -> None:
    base = nn.Sequential(nn.Sequential(nn.Linear(64, 32)))
    quantize_(base, HqqConfig(8, 32))
    x = torch.randn(3, 64)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    )
    layer = base[0][0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = layer.get_base_layer().weight.dequantize() + layer.scaling["default"] * b @ a
    assert torch.allclose(model(x), nn.functional.linear(x, dense, layer.get_base_layer().bias), atol=1e-4)
    model.merge_adapter()
    assert torch.allclose(layer.get_base_layer().weight.dequantize(), dense, atol=0.02)


def test_what_is_no_product_is_refused() -> None:
    from hqqtensor.integrations.peft.adapted_weight import AdaptedWeight

    w = HQQTensor.from_hp(torch.randn(2, 32, 32), HqqConfig(4, 32))
    weight = AdaptedWeight(w, torch.ones(2, 32, 1), torch.ones(2, 1, 32))
    with pytest.raises(NotImplementedError, match="einsum is not offered"):
        torch.einsum("ei,eoi->eo", torch.ones(2, 32), weight)
    with pytest.raises(NotImplementedError, match="last two dimensions"):
        weight.transpose(0, 1)
    with pytest.raises(NotImplementedError, match="a stack of experts"):
        weight[0][0]


def test_rows_of_experts_get_one_gradient_together() -> None:
    torch.manual_seed(0)
    weight: Any = HQQTensor.from_hp(torch.randn(3, 32, 64), HqqConfig(4, 32))
    lhs, rhs, x = (torch.randn(shape, requires_grad=True) for shape in ((3, 32, 2), (3, 2, 64), (9, 64)))
    offsets = torch.tensor([4, 4, 7], dtype=torch.int32)  # none for the second expert, two rows for no expert
    out = torch._grouped_mm(x, AdaptedWeight(weight, lhs, rhs).mT, offs=offsets)
    both = weight.dequantize() + lhs @ rhs
    want = torch.cat([x[:4] @ both[0].T, x[4:7] @ both[2].T, torch.zeros(2, 32)])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    grads, wanted = (torch.autograd.grad(y.square().sum(), (x, lhs, rhs), retain_graph=True) for y in (out, want))
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-3)
    # The gradient of a slice is a tensor as large as x, and there would be one for each expert.
    assert "SliceBackward0" in backward_of(want) and "SliceBackward0" not in backward_of(out)


def backward_of(out: Tensor) -> set[str]:
    """Names of all steps of the gradient of ``out``."""
    names: set[str] = set()
    steps: set[Any] = {out.grad_fn}
    while steps:
        step = steps.pop()
        if step is not None:
            names.add(type(step).__name__)
            steps |= {before for before, _ in step.next_functions}
    return names
