"""A prepared model that is changed afterwards still gives right results, and a model that cannot be served says why."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, prompts, quantized
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, backend, dequantize_, quantize_
from hqqtensor.generation import prepare_for_generation_, undo_generation_


def logits(model: Any) -> torch.Tensor:
    """Of a prompt and two more tokens."""
    ids = prompts()["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(2)])


def served(model: Any) -> bool:
    """Whether the last token would go through the decoder."""
    return model.model.__dict__["forward"]._ready()


def swap_weight(model: Any) -> None:
    new = quantized("llama3 rope").model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = new


def write_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(2)


def write_weight(model: Any) -> None:
    other = quantized("llama3 rope").model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.copy_(other)


def load_state(model: Any) -> None:
    other = quantized("llama3 rope")
    names = {name: value for name, value in other.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(names, strict=False, assign=True)


def replace_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


def replace_norm(model: Any) -> None:
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.data.add_(1)


def share_memory(model: Any) -> None:
    model.share_memory()


def to_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def dequantize(model: Any) -> None:
    dequantize_(model)


def fewer_bits(model: Any) -> None:
    dequantize_(model)
    quantize_(model, HqqConfig(2, 16))


CHANGES: list[Callable[[Any], None]] = [
    swap_weight, write_norm, write_weight, load_state, replace_layer, replace_norm, share_memory, to_bfloat16,
    dequantize, fewer_bits,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_after_preparing_is_followed(change: Callable[[Any], None]) -> None:
    plain, model = quantized("llama"), prepare_for_generation_(quantized("llama"))
    logits(model)
    assert served(model)
    change(plain)
    change(model)
    tolerance = 0.1 if change is to_bfloat16 else 1e-3
    torch.testing.assert_close(logits(model), logits(plain), rtol=tolerance, atol=tolerance)
    assert served(model)


def test_while_hooks_are_there_they_are_called() -> None:
    model = prepare_for_generation_(quantized("llama"))
    want, seen = logits(model), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
    assert len(seen) == 3 and not served(model)
    handle.remove()
    logits(model)
    assert len(seen) == 3 and served(model)


def test_a_hook_that_changes_a_layer_has_its_effect() -> None:
    plain, model = quantized("llama"), prepare_for_generation_(quantized("llama"))
    logits(model)
    for m in (plain, model):
        m.model.layers[0].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 0}), with_kwargs=True
        )
    assert torch.equal(logits(model), logits(plain))


def test_an_adapter_is_used_and_can_be_merged() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    results = []
    for prepared in (False, True):
        model = quantized("llama", config=HqqConfig(8, 32))
        if prepared:
            logits(prepare_for_generation_(model))
        torch.manual_seed(5)
        adapted = peft.get_peft_model(model, config).eval()
        with_adapter = logits(adapted)
        adapted = adapted.merge_and_unload()
        results.append((with_adapter, logits(adapted)))
        assert not prepared or served(adapted)
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_training_mode_and_gradients_take_the_models_own_code() -> None:
    model = prepare_for_generation_(quantized("llama"))
    logits(model)
    model.train()
    assert not served(model)
    model.eval()
    assert served(model)
    ids = prompts()["input_ids"]
    out = model(ids, use_cache=True)
    more = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert more.logits.requires_grad


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_is_asked_for_is_given(asked: str) -> None:
    model = prepare_for_generation_(quantized("llama"))
    model.set_attn_implementation("eager")
    out = model.generate(**prompts(), max_new_tokens=3, return_dict_in_generate=True, **{asked: True})
    steps = out.attentions if asked == "output_attentions" else out.hidden_states
    assert len(steps) == 3 and all(len(step) >= 3 for step in steps)


def test_another_backend_takes_the_models_own_code() -> None:
    model = prepare_for_generation_(quantized("llama"))
    want = logits(model)
    with backend("reference"):
        torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)


def test_a_copy_and_a_pickled_model_are_prepared_too_and_have_weights_of_their_own() -> None:
    model = prepare_for_generation_(quantized("llama"))
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model.__dict__["forward"].base is other.model
        torch.testing.assert_close(logits(other), want)
        assert served(other)
        write_norm(other)
        assert not torch.allclose(logits(other), want)
    torch.testing.assert_close(logits(model), want)


def test_a_prepared_model_is_saved_and_loaded_as_any(tmp_path: Any) -> None:
    model = prepare_for_generation_(quantized("llama"))
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "forward" not in loaded.model.__dict__
    torch.testing.assert_close(logits(prepare_for_generation_(loaded)), want)


def test_weights_are_moved_and_stay_the_same_parameters_with_the_same_numbers() -> None:
    model = quantized("llama", config=HqqConfig(4, 20, quant_scale=True, quant_zero=True, meta_nbits=4))
    weights = {name: (p, p.qdata.data_ptr()) for name, p in model.named_parameters() if isinstance(p, HQQTensor)}
    dense = {name: p.dequantize() for name, (p, _) in weights.items()}
    prepare_for_generation_(model)
    after = dict(model.named_parameters())
    for name, (p, place) in weights.items():
        assert after[name] is p and p.qdata.data_ptr() != place
        assert torch.equal(p.dequantize(), dense[name])
    storages = {p.qdata.untyped_storage().data_ptr() for p, _ in weights.values()}
    assert len(storages) == len(weights)  # each can be saved, moved and freed by itself


def test_a_tied_quantized_embedding_stays_tied() -> None:
    model = FAMILIES["llama"]()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    quantize_(model.eval(), HqqConfig(4, 32, embedding_nbits=8))
    want = logits(model)
    prepare_for_generation_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and isinstance(model.lm_head.weight, HQQTensor)
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
    assert served(model)


def refused(model: Any, match: str) -> None:
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        prepare_for_generation_(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_models_that_cannot_be_served_say_why_and_stay_as_they_were() -> None:
    other_class = quantized("llama")
    other_class.model.layers[2].mlp.up_proj = nn.Sequential(nn.Linear(64, 96)).eval()
    refused(other_class, r"layers\.2\.mlp\.up_proj is not an nn.Linear, but a Sequential")
    int8 = HqqConfig(4, 32, axis=0, activation="int8")
    refused(quantized("llama", config=int8), r"layers\.0\.self_attn\.q_proj has 8-bit activations and axis 0")
    refused(quantized("mixtral", config=HqqConfig(4, 32, axis=0)), r"gate_up_proj has experts of axis 0")
    refused(quantized("llama").train(), r"call model\.eval\(\)")
    refused(nn.Linear(2, 2), "Linear holds no base models of")
    other = quantized("llama")
    other.model.layers[0].mlp.act_fn = nn.ReLU().eval()
    refused(other, r"layers\.0\.mlp has no act_fn of")
    with backend("reference"):
        refused(quantized("llama"), "the backend 'reference' has no decoder")


def test_a_layer_that_computes_something_else_is_refused() -> None:
    model = quantized("llama")
    model.model.layers[0].self_attn.scaling = torch.nn.Parameter(torch.tensor(0.1)).item()
    prepare_for_generation_(model)  # a scaling of its own is read
    undo_generation_(model)
    attention = type(model.model.layers[0].self_attn)

    class Doubled(attention):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out * 2, weights

    model.model.layers[0].self_attn.__class__ = Doubled
    refused(model, r"layers\.0, a LlamaDecoderLayer, would give other results: relative error")


def test_layers_of_another_class_are_not_taken_for_granted() -> None:
    model = quantized("llama")
    prepare_for_generation_(model)
    layer = type(model.model.layers[1])

    class Reversed(layer):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return -super().forward(*args, **kwargs)

    model.model.layers[1].__class__ = Reversed
    plain = quantized("llama")
    plain.model.layers[1].__class__ = Reversed
    torch.testing.assert_close(logits(model), logits(plain))


def test_a_model_of_one_layer_is_served() -> None:
    model = quantized("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    want = logits(model)
    torch.testing.assert_close(logits(prepare_for_generation_(model)), want, rtol=1e-3, atol=1e-3)
    assert served(model)
