"""``initialize_lora_from_error``: adapters that begin by undoing quantization error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft_training import logits
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.integrations.peft import initialize_lora_from_error, seen_inputs

peft = pytest.importorskip("peft")
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=2, tie_word_embeddings=True))


def quantized(rank: int, **options: Any) -> Any:
    model = mixtral()
    # The output layer is tied to the embedding and stays so.
    quantize_(model, HqqConfig(2, 32, embedding_nbits=2, skip_modules=[]))
    options = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "lora_alpha": 3, **options}
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_parameters=names, **options))


def test_full_rank_undoes_the_whole_error(tmp_path: Path) -> None:
    dense = mixtral()
    dense.save_pretrained(tmp_path)
    model = quantized(64)
    before = [p.qdata.clone() for p in model.parameters() if isinstance(p, HQQTensor)]
    left = initialize_lora_from_error(model, tmp_path)
    assert sorted(left) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert max(left.values()) < 1e-6
    after = [p.qdata for p in model.parameters() if isinstance(p, HQQTensor)]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "parameter_name"):
            weight = getattr(layer.get_base_layer(), layer.parameter_name)
            path = name.replace(".base_layer", "")
            want = dense.get_submodule(path).get_parameter(layer.parameter_name)
            got = weight.dequantize() + layer.get_delta_weight("default")
            assert torch.allclose(got, want, atol=1e-5), name


@pytest.mark.parametrize("dora", [False, True])
def test_a_few_ranks_bring_the_model_nearer_and_a_directory_gives_the_same(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE))
    dense.save_pretrained(tmp_path)
    adapters, outputs = [], []
    for source in (None, dense, tmp_path):
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=HqqConfig(2, 32))
        options = {"target_modules": "all-linear", "use_dora": dora, "use_rslora": not dora}
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, **options))
        if source is not None:
            left = initialize_lora_from_error(model, source)
            assert len(left) == 7 and 0.1 < max(left.values()) < 0.9
        adapters.append({n: p.detach() for n, p in model.named_parameters() if "lora" in n})
        outputs.append(logits(model))
    assert all(torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[1])
    plain, corrected = ((out - logits(dense)).abs().mean() for out in outputs[:2])
    assert corrected < 0.7 * plain


def llama(folder: Path) -> tuple[Any, Any]:
    """A dense model in ``folder`` and the same with 2 bits and adapters of every linear layer."""
    torch.manual_seed(0)
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE))
    dense.save_pretrained(folder)
    model = tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=HqqConfig(2, 32))
    return dense, peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))


def batches() -> list[dict[str, Tensor]]:
    """Text of few words, so that layers see few directions."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 8, (4, 32), generator=generator)} for _ in range(4)]


def output_error(model: nn.Module, dense: nn.Module) -> float:
    """Mean squared error of the logits on text like that of ``batches``."""
    model.eval()
    ids = torch.randint(0, 8, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(ids).logits - dense(ids).logits).square().mean().item()


def test_what_layers_see_and_rounds_bring_the_model_nearer_still(tmp_path: Path) -> None:
    errors, shares = [], []
    for options in ({}, {"rounds": 3}, {"batches": batches()}, {"batches": batches(), "rounds": 3}):
        dense, model = llama(tmp_path)
        weights = {n: p for n, p in model.named_parameters() if isinstance(p, HQQTensor)}
        codes = {n: p.qdata.clone() for n, p in weights.items()}
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        left = initialize_lora_from_error(model, tmp_path, **options)
        assert trained == [n for n, p in model.named_parameters() if p.requires_grad] and len(trained) == 14
        for name, new in model.named_parameters():
            if name in weights:
                assert torch.equal(new.qdata, codes[name]) or "rounds" in options
                assert new.describe() == weights[name].describe() and new.nbytes == weights[name].nbytes
        errors.append(output_error(model, dense))
        shares.append(sum(left.values()) / len(left))
    assert shares[1] < shares[0] and shares[3] < shares[2]
    assert max(errors[1:]) < errors[0] and errors[3] < 0.7 * errors[0]


def test_moments_may_be_taken_of_few_layers_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = []
    for size in (seen_inputs.BYTES_AT_A_TIME, 1):
        monkeypatch.setattr(seen_inputs, "BYTES_AT_A_TIME", size)
        _, model = llama(tmp_path)
        initialize_lora_from_error(model, tmp_path, batches=batches())
        adapters.append({n: p.detach() for n, p in model.named_parameters() if "lora" in n})
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())


def test_what_cannot_be_initialized_is_refused_and_nothing_changes() -> None:
    dense = mixtral()
    model = quantized(4)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" in n}
    with pytest.raises(ValueError, match="no quantized weight has a LoRA adapter named 'other'"):
        initialize_lora_from_error(model, dense, "other")
    del dense.model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match=r"experts.down_proj must be a dense weight \[2, 64, 64\], it is missing"):
        initialize_lora_from_error(model, dense)
    with pytest.raises(ValueError, match="it is HQQTensor"):
        initialize_lora_from_error(model, quantized(4).unload())
    for bad, text in (({"rounds": -1}, "0 or more"), ({"batches": []}, "at least one")):
        with pytest.raises(ValueError, match=text):
            initialize_lora_from_error(model, mixtral(), **bad)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora" in n)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged"):
        initialize_lora_from_error(model, mixtral())
