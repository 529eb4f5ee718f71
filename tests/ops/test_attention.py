"""``hqqtensor::attention``: the compiled kernel against softmax(q k) v written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor, ops
from hqqtensor.kernels import cpu
from hqqtensor.ops.attention import attention
from hqqtensor.ops.packed_states import PackedStates


def written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """In float64, with heads of keys repeated: ``[B, T, H, D]``."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp().view(1, -1, 1, 1))
    return torch.einsum("bhts,bhsd->bthd", torch.where(total > 0, weights / total, 0), v)


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def window(T: int, S: int, size: int) -> Tensor:
    query, place = torch.arange(S - T, S).unsqueeze(1), torch.arange(S)
    return ((place <= query) & (place > query - size)).view(1, 1, T, S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "H", "KH", "T", "S", "D", "options"),
    [
        (1, 9, 3, 1, 1500, 64, {}),
        (1, 4, 4, 1, 1, 16, {}),
        (2, 8, 1, 3, 77, 48, {"window": 20}),
        (3, 6, 2, 1, 600, 32, {"softcap": 3.0, "sinks": True}),
        (2, 4, 2, 8, 40, 128, {"window": 5, "sinks": True}),
        (2, 4, 2, 2, 33, 20, {"softcap": 2.0, "window": 9, "sinks": True}),  # 20: the plain code
    ],
)
def test_it_equals_what_is_written_out(
    dtype: torch.dtype, B: int, H: int, KH: int, T: int, S: int, D: int, options: dict[str, Any]
) -> None:
    q = random(B, H, T, D, dtype=dtype)
    k, v = random(B, KH, S, D, dtype=dtype, seed=1), random(B, KH, S, D, dtype=dtype, seed=2)
    mask = window(T, S, options["window"]) if "window" in options else None
    sinks = random(H, seed=3) if "sinks" in options else None
    args = (mask, sinks, 0.3, options.get("softcap", 0.0))
    got = attention(q, k, v, *args)
    assert got.dtype == dtype and got.shape == (B, T, H, D) and got.is_contiguous()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), written_out(q, k, v, *args), rtol=tolerance, atol=tolerance)
    with ops.backend("reference"):
        torch.testing.assert_close(attention(q, k, v, *args), got, rtol=tolerance, atol=tolerance)


def test_keys_are_read_where_they_lie_and_masks_may_differ() -> None:
    """As transformers has them: queries transposed, caches with room behind their tokens, padding on the left."""
    B, H, KH, T, S, D = 3, 4, 2, 2, 50, 32
    q = random(B, T, H, D).transpose(1, 2)
    k, v = (random(B, KH, S + 30, D, seed=i)[:, :, 4 : S + 4] for i in (1, 2))
    mask = window(T, S, S).expand(B, -1, -1, -1).clone()
    for b in range(B):
        mask[b, :, :, : 7 * b] = False
    mask[2, 0, 1] = False  # a token that sees none
    got = attention(q, k, v, mask, None, 0.2)
    torch.testing.assert_close(got.double(), written_out(q, k, v, mask, None, 0.2, 0.0), rtol=1e-5, atol=1e-5)
    assert not got[2, 1].any()
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)  # rows that no kernel reads: the plain code
    torch.testing.assert_close(attention(q, turned, v, mask, None, 0.2), got, rtol=1e-5, atol=1e-5)


def test_traced_and_other_devices_give_the_shape() -> None:
    q, k = torch.empty(2, 4, 1, 16, device="meta"), torch.empty(2, 2, 9, 16, device="meta")
    assert attention(q, k, k).shape == (2, 1, 4, 16)
    q, k = random(2, 4, 1, 16), random(2, 2, 9, 16)
    torch.library.opcheck(torch.ops.hqqtensor.attention, (q, k, k, None, None, 1.0, 0.0), test_utils="test_faketensor")


def packed_states(
    B: int, KH: int, blocks: int, D: int, nbits: int, axes: tuple[int, int], rotated: tuple[bool, bool]
) -> PackedStates:
    """Blocks of 32 tokens, as a cache packs them."""
    signs = torch.randint(0, 2, (D,), generator=torch.manual_seed(5)) * 2.0 - 1 if any(rotated) else None
    parts: list[Tensor] = []
    for axis in axes:
        for t in range(blocks * B * KH):
            w = HQQTensor.from_hp(random(32, D, seed=t + axis), HqqConfig(nbits, 16 if axis else 32, axis=axis))
            parts += [w.qdata, w.scale, w.zero_point]  # type: ignore[list-item]
    of_axis = [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
    tensors = [torch.stack(of[i::3]).unflatten(0, (blocks, B, KH)) for of in of_axis for i in range(3)]
    return PackedStates(tuple(tensors), nbits, 16 if axes == (1, 1) else 32, *axes, *rotated, signs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "KH", "T", "blocks", "D", "nbits", "axes", "rotated"),
    [
        (1, 9, 3, 1, 40, 64, 4, (0, 0), (False, False)),
        (2, 4, 2, 3, 5, 32, 8, (1, 1), (True, True)),
        (3, 4, 4, 1, 1, 16, 2, (0, 0), (True, False)),
    ],
)
def test_packed_tokens_are_read_as_what_they_stand_for(
    dtype: torch.dtype, B: int, H: int, KH: int, T: int, blocks: int, D: int, nbits: int, axes: tuple[int, int],
    rotated: tuple[bool, bool],
) -> None:  # fmt: skip
    q, recent = random(B, H, T, D, dtype=dtype), 7 + T
    k, v = random(B, KH, recent, D, dtype=dtype, seed=1), random(B, KH, recent, D, dtype=dtype, seed=2)
    packed = packed_states(B, KH, blocks, D, nbits, axes, rotated)
    S = packed.tokens + recent
    assert packed.tokens == 32 * blocks
    mask = window(T, S, S - 20).expand(B, -1, -1, -1)
    sinks = random(H, seed=3)
    old = packed.dense(D, torch.float32)
    want = written_out(
        q, *(torch.cat([a, b.float()], 2) for a, b in zip(old, (k, v), strict=True)), mask, sinks, 0.2, 0
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for backend in ("auto", "reference"):
        with ops.backend(backend):
            got = attention(q, k, v, mask, sinks, 0.2, packed=packed)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_wrong_packed_states_are_errors() -> None:
    q, k = torch.ones(1, 4, 1, 32), torch.ones(1, 2, 9, 32)
    good = packed_states(1, 2, 3, 32, 4, (0, 0), (True, False))
    assert good.signs is not None
    for packed, match in (
        (good._replace(signs=None), "packed states have signs if they are rotated"),
        (good._replace(signs=good.signs[:16]), r"signs of packed states must be contiguous float32 \[32\]"),
        (good._replace(tensors=good.tensors[:3]), "packed states are 6 tensors"),
        (good._replace(tensors=tuple(t[:, :, :1] for t in good.tensors)), "packed states must be"),
        (good._replace(tensors=good.tensors[:3] + tuple(t[:2] for t in good.tensors[3:])), "as many packed values"),
    ):
        with pytest.raises(RuntimeError, match=match):
            attention(q, k, k, packed=packed)


GOOD = {"query": torch.ones(2, 4, 3, 16), "key": torch.ones(2, 2, 9, 16), "value": torch.ones(2, 2, 9, 16)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"query": torch.ones(4, 3, 16)}, r"query must be floating-point \[batch, heads, tokens, dim\]"),
        ({"query": torch.ones(2, 4, 3, 16, dtype=torch.int64)}, "query must be floating-point"),
        ({"query": torch.ones(2, 4, 0, 16)}, "query must be floating-point"),
        ({"key": torch.ones(2, 3, 9, 16), "value": torch.ones(2, 3, 9, 16)}, "with heads that 4 share"),
        ({"value": torch.ones(2, 2, 8, 16)}, r"key and value must be \[2, heads, tokens, 16\]"),
        ({"key": torch.ones(2, 2, 9, 16).bfloat16()}, "of the query's dtype"),
        ({"key": torch.ones(2, 2, 9, 32)}, "key and value must be"),
        ({"mask": torch.ones(2, 1, 3, 9)}, r"mask must be bool \[2 or 1, 1, 3, 9\]"),
        ({"mask": torch.ones(2, 4, 3, 9, dtype=torch.bool)}, "mask must be bool"),
        ({"sinks": torch.ones(2)}, r"sinks must be floating-point \[4\]"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_wrong_arguments_are_errors(changes: dict[str, Any], match: str, backend: str) -> None:
    if backend == "cpu" and cpu.why_unavailable():
        pytest.skip("no compiled kernels here")
    with ops.backend(backend), pytest.raises(RuntimeError, match=match):
        attention(**{**GOOD, **changes})
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=match):
            attention(**{**GOOD, **changes})
