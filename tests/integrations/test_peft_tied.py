"""Adapters of embeddings and tied output layers, DoRA included, and gradients summed over several batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft_training import IDS, logits

from hqqtensor import HqqConfig, HQQTensor, quantize_

peft = pytest.importorskip("peft")


def llama() -> Any:
    """With a quantized embedding to which the output layer is tied."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    quantize_(model, HqqConfig(4, 32, embedding_nbits=8, skip_modules=[]))
    assert model.lm_head.weight is model.model.embed_tokens.weight and isinstance(model.lm_head.weight, HQQTensor)
    return model


def adapted(targets: list[str], **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    )


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_and_tied_heads_learn_save_and_merge(dora: bool, tying: bool, tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"] if tying else ["q_proj", "embed_tokens", "lm_head"]
    model = adapted(targets, use_dora=dora, ensure_weight_tying=tying)
    base = model.get_base_model()
    shared = base.model.embed_tokens.base_layer.weight
    assert base.lm_head.base_layer.weight is shared
    before = shared.qdata.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(shared.qdata, before)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), want)
    with model.disable_adapter():
        effect = (logits(model) - want).abs().max()
    model.merge_adapter()
    assert 0 < (logits(model) - want).abs().max() < 0.2 * effect
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight is shared


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    model = adapted(["q_proj", "down_proj"])
    batch = torch.stack([IDS[0], IDS[0] + 7])
    model(batch, labels=batch).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in batch:
        (model(part[None], labels=part[None]).loss / 2).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4
    for got, grad in zip(grads, want, strict=True):
        assert torch.allclose(got, grad, atol=1e-6)
