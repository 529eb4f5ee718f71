"""``attn_implementation="hqqtensor"``: models without a family description give what transformers' "eager" gives."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hqqtensor.generation import growing_cache
from hqqtensor.integrations.transformers import attention as interface
from hqqtensor.integrations.transformers.cache import HqqQuantizedCache
from hqqtensor.integrations.transformers.joined_states import JoinedStates

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SIZES, **WINDOW, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0)
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, **WINDOW, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**{name: size for name, size in SIZES.items() if name != "num_key_value_heads"})
    ),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """New tokens of each call of the operator."""
    operator, seen = interface.attention, []
    monkeypatch.setattr(interface, "attention", lambda q, *rest: (seen.append(q.shape[2]), operator(q, *rest))[1])
    return seen


def scores(model: Any, implementation: str, make_cache: Callable[[Any], Any]) -> Tensor:
    """Logits of a prompt padded on the left, of three tokens after it, and of six single ones."""
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 96, (2, 20), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache, out, at = make_cache(model.config), [], 0
    with torch.no_grad():
        for count in (11, 3, *[1] * 6):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + count]
            part = {"input_ids": ids[:, at : at + count], "attention_mask": mask[:, : at + count]}
            out.append(model(**part, position_ids=places, past_key_values=cache).logits)
            at += count
    return torch.cat(out, 1)[mask.bool()]


@pytest.mark.parametrize("make_cache", [lambda config: tf.DynamicCache(config=config), growing_cache])
@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_eager_attention(name: str, make_cache: Any, calls: list[int]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # sinks are zero at first
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    eager = scores(model, "eager", make_cache)
    assert not calls
    torch.testing.assert_close(scores(model, "hqqtensor", make_cache), eager, rtol=1e-4, atol=1e-4)
    assert set(calls) == {1, 3}  # prompts are torch's


def test_generate_takes_it_by_its_name(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = MODELS["olmo2"]().eval()
    ids = torch.randint(3, 96, (1, 12))
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation("hqqtensor")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)
    cache = growing_cache(model.config)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache), want)
    assert len(calls) == 2 * 2 * 7


def quantized_cache(config: Any, kind: Any = HqqQuantizedCache, rotation: str | None = None) -> Any:
    return kind(config, nbits=8, q_group_size=4, residual_length=3, rotation=rotation)


@pytest.mark.parametrize("rotation", [None, "keys", "both"])
@pytest.mark.parametrize("name", ["olmo2", "gemma2", "gpt-neox"])
def test_a_quantized_growing_cache_is_read_packed(
    name: str, rotation: str | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    want = scores(model, "eager", lambda config: quantized_cache(config, rotation=rotation))
    growing = partial(quantized_cache, kind=growing_cache, rotation=rotation)
    torch.testing.assert_close(scores(model, "eager", growing), want, rtol=1e-2, atol=1e-2)  # by torch's operators
    assert not calls
    dense: list[Any] = []
    monkeypatch.setattr(JoinedStates, "dense", lambda states: dense.append(states))
    # A code may round the other way where a state differs in its last bit.
    torch.testing.assert_close(scores(model, "hqqtensor", growing), want, rtol=1e-2, atol=1e-2)
    assert set(calls) == {1, 3} and not dense


def test_the_states_of_a_quantized_growing_cache_are_tensors_for_everybody_else() -> None:
    config = MODELS["olmo2"]().config
    plain, cache = quantized_cache(config), quantized_cache(config, growing_cache)
    with torch.no_grad():
        for count in (11, 1, 2, 1, 30, 1):
            new = [torch.randn(2, 2, count, 16, generator=torch.manual_seed(count)) for _ in "kv"]
            want, got = plain.update(*new, 0), cache.update(*new, 0)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a + 0, b, rtol=1e-5, atol=1e-5)
                assert a.shape == b.shape
        assert isinstance(got[0], JoinedStates)
        before, buffers = got[0].clone(), cache.layers[0]._blocks[0]._buffers
        for _ in range(5):
            cache.update(*(t[:, :, :1] for t in new), 0)
        assert torch.equal(got[0].clone(), before)  # what was given stays as it was
        assert cache.layers[0]._blocks[0]._buffers[0] is buffers[0]  # and what was packed where it was
        other = copy.deepcopy(cache)
        cache.crop(-9)
        assert other.get_seq_length() == cache.get_seq_length() + 9
        want = cache.layers[0].packed.dense(16, torch.float32)[0]
        torch.testing.assert_close(other.layers[0].packed.dense(16, torch.float32)[0][:, :, : want.shape[2]], want)


def test_training_takes_torch_and_has_gradients(calls: list[int]) -> None:
    torch.manual_seed(0)
    gradients = []
    model = MODELS["gpt-oss"]().train()
    for implementation in ("eager", "hqqtensor"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        ids = torch.arange(3, 9).unsqueeze(0)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert not calls
