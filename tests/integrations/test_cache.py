import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.integrations.transformers.cache import HqqCacheLayer, HqqQuantizedCache
from hqqtensor.kernels import cpu

CONFIG = tf.LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=1, pad_token_id=0,
)  # fmt: skip
BOTH_AXES = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(CONFIG).eval()


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    # Keys have channels of very different size, as in real models.
    spread = torch.logspace(-1, 1, 64)
    return torch.randn(batch, 2, tokens, 64) * spread, torch.randn(batch, 2, tokens, 64)


def layer(cache: HqqQuantizedCache) -> HqqCacheLayer:
    found = cache.layers[0]
    assert isinstance(found, HqqCacheLayer)
    return found


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("axis_key", "axis_value"), BOTH_AXES)
@pytest.mark.parametrize(("nbits", "bound"), [(8, 0.01), (4, 0.13), (2, 0.6)])
def test_error_is_that_of_the_width_and_recent_tokens_are_exact(
    nbits: int, bound: float, axis_key: int, axis_value: int
) -> None:
    cache = HqqQuantizedCache(CONFIG, nbits, axis_key, axis_value, q_group_size=32, residual_length=16)
    keys, values = states(101)
    exact = cache.update(keys, values, 0)
    assert torch.equal(exact[0], keys) and torch.equal(exact[1], values)  # prompt: computed with as it is
    got = cache.update(*states(1, 1), 0)
    assert cache.get_seq_length() == 102
    for out, want in zip(got, (keys, values), strict=True):
        assert torch.equal(out[:, :, 64:101], want[:, :, 64:]) and not torch.equal(out[:, :, :64], want[:, :, :64])
        assert error(out[:, :, :101], want) < bound
    assert not cache.layers[1].is_initialized


def test_blocks_are_quantized_once_and_memory_shrinks() -> None:
    cache = HqqQuantizedCache(CONFIG, 4, q_group_size=32, residual_length=32)
    keys, values = states(256)
    cache.update(keys[:, :, :70], values[:, :, :70], 0)
    first = cache.update(keys[:, :, 70:71], values[:, :, 70:71], 0)
    for t in range(71, 256):
        last = cache.update(keys[:, :, t : t + 1], values[:, :, t : t + 1], 0)
    assert torch.equal(last[0][:, :, :32], first[0][:, :, :32]) and error(last[0], keys) < 0.13
    # 224 packed tokens at 4 bits with two float16 numbers a group of 32, and 32 in float32.
    packed = 2 * 2 * 224 * 64 * 2 * (4 + 1) // 8
    assert cache.nbytes == packed + 2 * 2 * 32 * 64 * 2 * 4


@pytest.mark.parametrize("axes", BOTH_AXES)
def test_nothing_dense_is_kept_and_what_was_returned_is_the_callers_own(axes: tuple[int, int]) -> None:
    cache = HqqQuantizedCache(CONFIG, 4, *axes, q_group_size=32, residual_length=8)
    for index in (0, 1):
        cache.update(*states(200, index), index)
    first = cache.update(*states(1, 2), 0)
    copies = [out.clone() for out in first]
    cache.update(*states(1, 3), 1)
    second = cache.update(*states(1, 4), 0)
    assert all(torch.equal(*pair) for pair in zip(first, copies, strict=True))
    for out in second:
        out.zero_()
    third = cache.update(*states(1, 5), 0)
    for out, want in zip(third, copies, strict=True):
        assert torch.equal(out[:, :, : want.shape[2]], want)
    held = [tensor for packed in layer(cache)._packed for tensor in packed.operand()[:3]] + [layer(cache).keys]  # type: ignore[union-attr]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held, layer(cache).values]}  # type: ignore[union-attr]
    assert sum(stored.values()) == layer(cache).nbytes


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="plain memory without the extension")
def test_memory_of_what_was_dropped_serves_the_next_layer_and_only_then() -> None:
    cache = HqqQuantizedCache(CONFIG, 4, q_group_size=32, residual_length=8)
    for index in (0, 1):
        cache.update(*states(200, index), index)

    def places(index: int) -> set[int]:
        return {out.data_ptr() for out in cache.update(*states(1, 2), index)}

    first = places(0)
    assert places(1) == first and places(0) == first
    view = cache.update(*states(1, 3), 1)[0][:, 1:, 5:]  # one piece is in use by what looks like another tensor
    kept = view.clone()
    assert view.untyped_storage().data_ptr() in first
    for index in (0, 1, 0):
        assert view.untyped_storage().data_ptr() not in places(index)
    assert torch.equal(view, kept)
    other = copy.deepcopy(cache)
    one, two = (c.update(*states(1, 4), 0) for c in (cache, other))
    assert torch.equal(one[0], two[0]) and one[0].data_ptr() != two[0].data_ptr()
    del cache, other, one
    assert two[0].isfinite().all()  # outlives its cache
    with torch.inference_mode():
        cache = HqqQuantizedCache(CONFIG, 4, q_group_size=32, residual_length=8)
        cache.update(*states(200), 0)
        cache.update(*states(1), 0)
    assert cache.update(*states(1), 0)[0].requires_grad is False


@pytest.mark.parametrize("axes", BOTH_AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tokens_come_back_as_any_backend_decodes_them(axes: tuple[int, int], dtype: torch.dtype) -> None:
    cache = HqqQuantizedCache(CONFIG, 3, *axes, q_group_size=32, residual_length=8)
    cache.update(*(t.to(dtype) for t in states(96)), 0)
    blocks = [packed.dequantize() for packed in layer(cache)._packed]  # type: ignore[union-attr]
    for choice in ("auto", "reference"):
        with backend(choice):
            got = cache.update(*(t.to(dtype) for t in states(1, 1)), 0)
        for out, want in zip(got, blocks, strict=True):
            assert out.dtype == dtype and torch.equal(out[:, :, :64], want.flatten(2, 3))


def test_groups_over_tokens_are_those_of_one_channel_of_one_head() -> None:
    cache = HqqQuantizedCache(CONFIG, 2, axis_key=0, axis_value=0, q_group_size=32, residual_length=0)
    keys, values = states(64)
    cache.update(keys, values, 0)
    got, _ = cache.update(*states(1, 1), 0)
    groups = keys[1, 1, 32:].T  # every channel of the second block of one head, as a row
    want = HQQTensor.from_hp(groups, HqqConfig(2, 32, scale_dtype=torch.float16)).dequantize()
    assert torch.equal(got[1, 1, 32:64], want.T)


@pytest.mark.parametrize("rotation", ["keys", "both"])
def test_rotated_states_come_back_as_they_were_and_outliers_cost_less(rotation: str) -> None:
    keys, values = states(96)
    keys[..., 5] *= 50  # one channel, whose group has all channels of a token
    errors = {}
    for each in (None, rotation):
        cache = HqqQuantizedCache(CONFIG, 4, 1, 1, q_group_size=64, residual_length=8, rotation=each)
        cache.update(keys, values, 0)
        got = cache.update(*states(1, 1), 0)
        errors[each] = [error(g[:, :, :64], w[:, :, :64]) for g, w in zip(got, (keys, values), strict=True)]
        assert torch.equal(got[0][:, :, 64:96], keys[:, :, 64:])
        cache.crop(-70)  # inside of what is packed: comes back turned back
        recent = layer(cache).keys
        assert error(recent, keys[:, :, : recent.shape[2]]) < 0.13
    assert errors[rotation][0] < 0.11 and errors[rotation][1] < 0.11
    exact = [i for i in (0, 1) if rotation == "keys" and i == 1]
    assert all(errors[rotation][i] == errors[None][i] for i in exact)


def test_rotation_needs_heads_of_a_power_of_two() -> None:
    cache = HqqQuantizedCache(CONFIG, q_group_size=8, residual_length=0, rotation="keys")
    with pytest.raises(ValueError, match="rotation of the cache needs heads of a power of two, got 48 channels"):
        cache.update(*(t[..., :48] for t in states(64)), 0)


def test_gradients_reach_the_tokens_that_are_not_packed() -> None:
    cache = HqqQuantizedCache(CONFIG, 4, q_group_size=32, residual_length=8)
    cache.update(*states(60), 0)
    new = [t.requires_grad_() for t in states(2, 1)]
    keys, values = cache.update(*new, 0)
    (keys.sum() + 3 * values.sum()).backward()
    assert torch.equal(new[0].grad, torch.ones_like(new[0])) and torch.equal(new[1].grad, torch.full_like(new[1], 3))  # type: ignore[arg-type]


def test_layers_can_be_cropped_reordered_selected_and_reset() -> None:
    cache = HqqQuantizedCache(CONFIG, 8, q_group_size=32, residual_length=8)
    keys, values = states(100)
    cache.update(keys, values, 0)
    full, _ = cache.update(*states(1, 1), 0)
    for removed in (3, 20, 40):  # in the window, to the edge of a block, inside of one
        cache.crop(-removed)
        full = full[:, :, : full.shape[2] - removed]
        assert cache.get_seq_length() == full.shape[2]
        got, _ = cache.update(*states(1, 2), 0)
        assert torch.equal(got[:, :, :-1], full)
        full = got
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    got, _ = cache.update(*states(1, 3, batch=4), 0)
    assert torch.equal(got[:, :, :-1], full[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([2]))
    got, _ = cache.update(*states(1, 4, batch=1), 0)
    assert torch.equal(got[:, :, :-2], full[[0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.update(keys, values, 0)[0], keys)


def generate(model: Any, cache: Any, **options: Any) -> Any:
    ids = torch.randint(3, 64, (2, 90), generator=torch.Generator().manual_seed(0))
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=24, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def test_generation_at_8_bits_says_what_an_exact_cache_says(model: Any) -> None:
    want = generate(model, tf.DynamicCache(config=CONFIG))
    got = generate(model, HqqQuantizedCache(CONFIG, 8, q_group_size=32, residual_length=16))
    assert torch.equal(got.sequences, want.sequences)
    assert error(torch.stack(got.logits), torch.stack(want.logits)) < 5e-3
    beams = generate(model, HqqQuantizedCache(CONFIG, 8, q_group_size=32, residual_length=16), num_beams=3)
    assert torch.equal(beams.sequences, generate(model, tf.DynamicCache(config=CONFIG), num_beams=3).sequences)


def test_a_narrow_cache_is_more_exact_than_transformers_hqq_backend() -> None:
    keys, values = states(256)
    for nbits in (4, 2):
        mine = HqqQuantizedCache(CONFIG, nbits, axis_key=0, axis_value=1, residual_length=0)
        theirs = tf.QuantizedCache("hqq", CONFIG, nbits=nbits, axis_key=0, axis_value=1, residual_length=1)
        errors = []
        for cache in (mine, theirs):
            cache.update(keys, values, 0)
            got = cache.update(*states(1, 1), 0)
            errors.append([error(g[:, :, :256], w) for g, w in zip(got, (keys, values), strict=True)])
        assert errors[0][0] < errors[1][0] and errors[0][1] < errors[1][1], errors


def test_sliding_layers_stay_as_they_are() -> None:
    config = tf.Gemma3TextConfig(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    kinds = [type(x).__name__ for x in HqqQuantizedCache(config).layers]
    assert kinds == ["DynamicSlidingWindowLayer"] * 5 + ["HqqCacheLayer"]


def test_bad_settings_are_named() -> None:
    for options, match in (
        ({"nbits": 9}, "nbits must be"),
        ({"axis_key": 2}, r"axis_key must be 0 \(over tokens\), 1 \(over channels\) or None, got 2"),
        ({"axis_value": None}, r"axis_value must be 0 \(over tokens\) or 1 \(over channels\), got None"),
        ({"residual_length": -1}, "residual_length must be 0 or more"),
        ({"solver": "magic"}, "solver"),
        ({"rotation": "values"}, r"rotation must be one of \['auto', None, 'keys', 'both'\], got 'values'"),
    ):
        with pytest.raises(ValueError, match=match):
            HqqQuantizedCache(CONFIG, **options)
    cache = HqqQuantizedCache(CONFIG, q_group_size=128, residual_length=0)
    with pytest.raises(ValueError, match=r"states of the cache: weight: group_size 128 is larger"):
        cache.update(*states(128), 0)
    assert cache.get_seq_length() == 0
