"""The cache's layers with room: transformers' own code and the decoder see the same keys and values in them."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import WINDOW, prompts, quantized
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hqqtensor.generation import prepare_for_generation_
from hqqtensor.generation.cache import RoomyLayer, RoomySlidingLayer, adopt, growing_cache
from hqqtensor.integrations.transformers.cache import ROTATIONS, HqqCacheLayer, HqqQuantizedCache


def filled(kind: type[DynamicLayer], length: int) -> Any:
    layer = kind(WINDOW) if kind is DynamicSlidingWindowLayer else kind()
    layer.update(*states(length))
    return layer


def states(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, 3, length, 16, generator=generator), torch.randn(
        batch, 3, length, 16, generator=generator
    )


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
@pytest.mark.parametrize("length", [2, WINDOW, 3 * WINDOW])
def test_a_layer_with_room_behaves_as_the_plain_one(kind: type[DynamicLayer], length: int) -> None:
    plain, roomy = filled(kind, length), adopt(filled(kind, length))
    assert type(roomy) is (RoomyLayer if kind is DynamicLayer else RoomySlidingLayer)
    for new in (1, 3, 1, 1, 40, 2, 1):
        want, got = plain.update(*states(new)), roomy.update(*states(new))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert torch.equal(plain.keys, roomy.keys) and torch.equal(plain.values, roomy.values)
        assert plain.get_seq_length() == roomy.get_seq_length()
        assert plain.get_mask_sizes(2) == roomy.get_mask_sizes(2)
    for change in (
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 3])),
    ):
        change(plain)
        change(roomy)
        assert torch.equal(plain.keys, roomy.keys) and torch.equal(plain.values, roomy.values)
    if kind is DynamicLayer:
        plain.crop(-4)
        roomy.crop(-4)
        assert torch.equal(plain.keys, roomy.keys)
    want, got = plain.update(*states(1)), roomy.update(*states(1))
    assert torch.equal(want[0], got[0])
    plain.reset()
    roomy.reset()
    assert roomy.get_seq_length() == plain.get_seq_length() == 0
    assert torch.equal(plain.update(*states(3))[0], roomy.update(*states(3))[0])


def test_a_token_goes_into_the_buffers_without_copying_them() -> None:
    layer = adopt(filled(DynamicLayer, 5))
    assert layer is not None
    buffers = layer.make_room(1)
    for _ in range(100):
        assert layer.make_room(1)[0] is buffers[0]
        layer.advance(1)
    assert layer.get_seq_length() == 105 and layer.keys.shape[2] == 105
    assert layer.keys.untyped_storage().data_ptr() == buffers[0].untyped_storage().data_ptr()


def test_a_sliding_layer_keeps_few_windows_of_memory() -> None:
    layer = adopt(filled(DynamicSlidingWindowLayer, 5))
    assert layer is not None
    for _ in range(5000):
        layer.make_room(1)
        layer.advance(1)
    assert layer.buffers is not None and layer.buffers[0].shape[2] < 2 * WINDOW + 300
    assert layer.get_seq_length() == 5005 and layer.keys.shape[2] == WINDOW - 1


def test_a_copied_cache_goes_its_own_way() -> None:
    layer = adopt(filled(DynamicLayer, 5))
    assert layer is not None
    layer.make_room(1)
    other = copy.deepcopy(layer)
    other.update(*states(1))
    layer.update(*states(2))
    assert other.get_seq_length() == 6 and layer.get_seq_length() == 7
    assert torch.equal(other.keys[:, :, 5:], states(1)[0]) and torch.equal(layer.keys[:, :, 5:], states(2)[0])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_conversation_goes_on_from_its_cache(name: str) -> None:
    """Prompts and answers by turns, the cache handed on: as without the decoder."""
    answers = []
    for prepared in (False, True):
        model = quantized(name)
        if prepared:
            prepare_for_generation_(model)
        cache, ids = DynamicCache(config=model.config), prompts()["input_ids"]
        for turn in range(3):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12,
                                 do_sample=False)  # fmt: skip
            ids = torch.cat([out, prompts(length=3 + 9 * turn)["input_ids"]], 1)
        answers.append(ids)
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_quantized_cache_gives_the_same_tokens_and_is_read_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, answers = quantized(name), []
    settings: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}

    def answer() -> Any:
        cache = HqqQuantizedCache(model.config, 8, q_group_size=16, residual_length=8)
        out = model.generate(**prompts(2, 30), **settings, past_key_values=cache)
        answers.append(out)
        return cache

    own = answer()
    prepare_for_generation_(model)
    dense = []
    make_dense = HqqCacheLayer._all

    def counted(layer: HqqCacheLayer, which: int, recent: torch.Tensor) -> torch.Tensor:
        dense.append(which)
        return make_dense(layer, which, recent)

    monkeypatch.setattr(HqqCacheLayer, "_all", counted)
    cache = answer()
    assert torch.equal(*answers)
    assert cache.get_seq_length() == own.get_seq_length() and cache.nbytes == own.nbytes
    # Only of the prompt; a model with windows keeps transformers' own code.
    assert (len(dense) == 2 * len(cache.layers)) == (name == "llama")


@pytest.mark.parametrize(
    ("name", "nbits", "rotation", "rotated"),
    [
        ("llama", 4, "auto", (True, True)),
        ("llama", 2, "auto", (True, True)),
        ("llama", 8, "auto", (False, False)),
        ("llama", 4, None, (False, False)),
        ("llama", 4, "keys", (True, False)),
        ("gemma3", 4, "auto", (False, False)),  # packed layers beside windows, which the decoder does not serve
    ],
)
def test_a_cache_is_rotated_by_itself_where_that_helps_and_costs_little(
    name: str, nbits: int, rotation: str | None, rotated: tuple[bool, bool]
) -> None:
    model = quantized(name)
    ids = prompts(1, 40)["input_ids"]

    def states(rotation: str | None) -> tuple[Any, Any]:
        cache = HqqQuantizedCache(model.config, nbits, q_group_size=16, residual_length=8, rotation=rotation)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            logits = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        return cache, logits

    for prepared in (False, True):
        if prepared:
            prepare_for_generation_(model)
        cache, logits = states(rotation)
        packed = [layer for layer in cache.layers if isinstance(layer, HqqCacheLayer)]
        expected = rotated if prepared or rotation != "auto" else (False, False)
        assert packed and {layer.rotated for layer in packed} == {expected}
        assert {layer.axes for layer in packed} == {(int(expected[0]), 1)}
        named = next(key for key, value in ROTATIONS.items() if value == expected)
        assert torch.equal(logits, states(named)[1])


def test_heads_that_cannot_be_rotated_are_left_by_themselves() -> None:
    cache = growing_cache(LlamaConfig(num_hidden_layers=1), nbits=4, q_group_size=8, residual_length=0)
    cache.update(*(torch.randn(1, 2, 16, 24) for _ in range(2)), 0)
    assert cache.layers[0].rotated == (False, False) and cache.get_seq_length() == 16


def test_a_quantized_cache_is_cropped_reordered_and_goes_on() -> None:
    results = []
    for prepared in (False, True):
        model = quantized("llama")
        if prepared:
            prepare_for_generation_(model)
        cache = HqqQuantizedCache(model.config, 8, q_group_size=16, residual_length=8)
        with torch.no_grad():
            ids = prompts(2, 45)["input_ids"]
            model(ids, past_key_values=cache, use_cache=True)
            steps = []
            for i in range(12):
                if i == 4:
                    cache.crop(-9)
                if i == 8:
                    cache.reorder_cache(torch.tensor([1, 0]))
                steps.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        results.append(torch.cat(steps))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_other_caches_take_the_models_own_code() -> None:
    model = quantized("llama")
    ids = prompts()
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    own = [model.generate(**ids, **settings, cache_implementation=kind) for kind in ("static", "offloaded_static")[:1]]
    prepare_for_generation_(model)
    assert torch.equal(model.generate(**ids, **settings, cache_implementation="static"), own[0])
    assert torch.equal(model.generate(**ids, **settings, use_cache=False), own[0])
