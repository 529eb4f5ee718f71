import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from fresh_python import run_fresh
from peft_training import IDS, logits, train
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor, quantize_

peft = pytest.importorskip("peft")
CONFIG = HqqConfig(8, 32)


def llama(path: Path, **more: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tf.LlamaForCausalLM(config).save_pretrained(path / "dense")
    return tf.LlamaForCausalLM.from_pretrained(path / "dense", quantization_config=CONFIG, **more)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options
    )


def base_weight(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_learn_what_they_would_on_dense_weights(dora: bool, tmp_path: Path) -> None:
    quantized = llama(tmp_path)
    dense = copy.deepcopy(quantized)
    dense.dequantize()
    models = []
    for base in (quantized, dense):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(base, lora(use_dora=dora)))
    losses, want = (train(m) for m in models)
    assert losses[-1] < losses[0] and losses == pytest.approx(want, rel=1e-4)
    assert isinstance(base_weight(models[0]), HQQTensor)
    assert not any(p.requires_grad for p in models[0].parameters() if isinstance(p, HQQTensor))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_quantizes_again_and_unmerging_is_exact(dora: bool, safe: bool, tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tmp_path), lora(use_dora=dora))
    train(model)
    want, before = logits(model), base_weight(model)
    model.merge_adapter(safe_merge=safe)
    merged = base_weight(model)
    assert isinstance(merged, HQQTensor) and merged.describe() == before.describe() and not torch.equal(merged, before)
    assert torch.allclose(logits(model), want, atol=0.02) and (want - logits(model)).abs().max() > 0
    model.unmerge_adapter()
    assert base_weight(model) is before and torch.equal(logits(model), want)


def test_unmerging_what_is_not_merged_changes_nothing(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tmp_path), lora())
    before = base_weight(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert base_weight(model) is before


def test_a_merged_model_saves_and_loads(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tmp_path), lora())
    train(model)
    merged = model.merge_and_unload()
    want = logits(merged)
    assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, HQQTensor)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")), want)


def test_a_failed_merge_changes_nothing(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tmp_path), lora())
    before = base_weight(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert base_weight(model) is before


@pytest.mark.parametrize("kind", ["from_pretrained", "quantize_"])
def test_adapters_save_and_load(kind: str, tmp_path: Path) -> None:
    base = llama(tmp_path)
    if kind == "quantize_":
        base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
        quantize_(base, CONFIG)
    model = peft.get_peft_model(base, lora())
    train(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    files = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = peft.PeftModel.from_pretrained(llama(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(again), want)


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        base = llama(tmp_path)
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, lora())
        model.train()
        assert base.is_gradient_checkpointing == checkpointing
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 8 and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_trainer_trains_adapters(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tmp_path), lora())
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    options = {"use_cpu": True, "max_steps": 3, "report_to": [], "learning_rate": 1e-2, "logging_steps": 1}
    args = tf.TrainingArguments(str(tmp_path / "out"), save_strategy="no", disable_tqdm=True, **options)
    trainer = tf.Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def check_merging(model: Any, layers: list[Any], run: Callable[[], Tensor]) -> None:
    """Merging puts dense weight + update, quantized as before, in each layer; unmerging puts the old weight back.

    The output moves by the rounding of the update alone, which is small against what the adapters do.
    """
    for layer in layers:  # updates as large as the weights: of both nothing may be missing from the sum
        ratio = layer.base_layer.weight.dequantize().abs().max() / layer.get_delta_weight("default").abs().max()
        for name, parameter in layer.named_parameters():
            if "_B" in name:
                parameter.data.mul_(ratio)
    with_adapters = run()
    with model.disable_adapter():
        effect = (with_adapters - run()).abs().max()
    before = [layer.base_layer.weight for layer in layers]
    want = [w.dequantize() + layer.get_delta_weight("default") for w, layer in zip(before, layers, strict=True)]
    model.merge_adapter()
    for layer, old, dense in zip(layers, before, want, strict=True):
        merged = layer.base_layer.weight
        assert isinstance(merged, HQQTensor) and merged.describe() == old.describe()
        assert merged.shape == old.shape and merged.transposed == old.transposed
        assert (merged.dequantize() - dense).abs().max() < 0.02 * dense.abs().max()  # 8 bits: half a step is 0.4 %
    moved = (run() - with_adapters).abs().max()
    assert 0 < moved < 0.1 * effect
    model.unmerge_adapter()
    assert all(layer.base_layer.weight is old for layer, old in zip(layers, before, strict=True))
    assert torch.equal(run(), with_adapters)


def test_conv1d_and_embeddings_take_adapters() -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=False)
    base = tf.GPT2LMHeadModel(config)
    quantize_(base, HqqConfig(8, 32, dynamic_config={"wte": {"nbits": 8}}))
    options = {"target_modules": ["c_attn", "wte"], "init_lora_weights": False, "fan_in_fan_out": True}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options))
    layers = [base.transformer.h[0].attn.c_attn, base.transformer.wte]
    assert layers[0].base_layer.weight.transposed
    check_merging(model, layers, lambda: logits(model))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_take_adapters(kind: type) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(kind(8, 8, 3))
    quantize_(base, HqqConfig(8, 24), filter_fn=lambda module, name: name == "0")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 8, *[5] * (base[0].weight.ndim - 2))
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 2 and all(grad.abs().max() > 0 for grad in grads)
    check_merging(model, [base[0]], lambda: model(x))
    with pytest.raises(NotImplementedError, match="use_dora: not offered for quantized convolutions"):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))


def test_importing_hqqtensor_does_not_import_peft_and_either_order_works() -> None:
    first = "import sys, hqqtensor; assert 'peft' not in sys.modules; import peft.tuners.lora.model as m"
    second = "import peft.tuners.lora.model as m, hqqtensor"
    register = "import hqqtensor.integrations.peft as h; h.register(); h.register()"
    check = """
import peft.utils.integrations as i, peft.tuners.lora.dora as d
assert i.dequantize_module_weight is d.dequantize_module_weight
for f in (m.dispatch_torchao, i.dequantize_module_weight):
    assert f.__wrapped__.__module__.startswith("peft."), f
"""
    for start in (first, second):
        done = run_fresh(f"{start}\n{register}\n{check}")
        assert done.returncode == 0, done.stderr
