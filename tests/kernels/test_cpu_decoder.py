"""Decoder layers as one operator against the same written out in torch, on the instruction set in use."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.generation.cache import adopt
from hqqtensor.integrations.transformers.cache import HqqQuantizedCache
from hqqtensor.kernels.cpu.decoder import CompiledDecoder
from hqqtensor.ops.decoder import DecoderShape

META = {"quant_scale": True, "quant_zero": True, "meta_nbits": 4}
SHAPE = DecoderShape(2, 96, 6, 2, 32, 112, 1e-5, 0.2, 0.0, "silu")


@dataclass
class Case:
    """A decoder's settings; what is not said is as in a Llama."""

    shape: DecoderShape = SHAPE
    config: HqqConfig = field(default_factory=lambda: HqqConfig(4, 32))
    dtype: torch.dtype = torch.float32
    joined: bool = False
    all_norms: bool = False
    bias: bool = False
    window: int = 0
    width: int = 32  # of the angles
    experts: int = 0
    normalized: bool = True
    dense: tuple[str, ...] = ()  # roles whose weights stay dense, in `dtype`


def make(case: Case) -> tuple[CompiledDecoder, list[dict[str, Any]]]:
    """A decoder, and its layers' tensors by role."""
    s, generator = case.shape, torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    decoder, layers = CompiledDecoder(s), []
    qkv = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
    rows = {role: count * s.head_dim for role, count in qkv.items()}
    rows = {"qkv": sum(rows.values())} if case.joined else rows
    sizes = {role: (n, s.hidden) for role, n in rows.items()} | {"o": (s.hidden, s.heads * s.head_dim)}
    halves = {"gate_up": 2 * s.intermediate} if case.joined else {"gate": s.intermediate, "up": s.intermediate}
    if case.experts:
        sizes["experts_gate_up"] = (2 * s.intermediate, s.hidden)
        sizes["experts_down"] = (s.hidden, s.intermediate)
    else:
        sizes |= {role: (n, s.hidden) for role, n in halves.items()} | {"down": (s.hidden, s.intermediate)}
    norms = {"input": s.hidden, "mlp": s.hidden}
    if case.all_norms:
        norms |= {"attention_out": s.hidden, "mlp_out": s.hidden, "q": s.head_dim, "k": s.head_dim}
    for i in range(s.layers):
        layer: dict[str, Any] = {}
        decoder.set_layer(i, case.window, i % 2)
        for role, n in norms.items():
            layer["norm " + role] = 1 + 0.3 * random(n)
            decoder.norm(i, role, layer["norm " + role])  # type: ignore[arg-type]
        if case.experts:
            layer["router"] = random(case.experts, s.hidden) * 0.3
            decoder.router(i, layer["router"], 2, case.normalized)
        for role, (n, k) in sizes.items():
            stack = (case.experts,) if role.startswith("experts") else ()
            w = HQQTensor.from_hp(random(*stack, n, k) / k**0.5, case.config)
            bias = 0.1 * random(n) if case.bias and not stack else None
            layer[role] = (w.dequantize().float(), bias)
            if role in case.dense:
                dense = w.dequantize().to(case.dtype)
                layer[role] = (dense.float(), bias)
                decoder.dense(i, role, dense, bias)  # type: ignore[arg-type]
                continue
            digits = 3 if case.dtype == torch.float32 else 2
            decoder.linear(i, role, w.operand(), bias, w.act_pre_scale, digits, w.rotation)  # type: ignore[arg-type]
        layers.append(layer)
    final = 1 + 0.3 * random(s.hidden)
    decoder.norm(0, "final", final)
    layers.append({"norm final": final})
    return decoder, layers


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[B, heads, T, D]``, cos and sin ``[B, T, width]``."""
    width = cos.shape[-1]
    first, rest = x[..., :width], x[..., width:]
    half = torch.cat([-first[..., width // 2 :], first[..., : width // 2]], -1)
    return torch.cat([first * cos.unsqueeze(1) + half * sin.unsqueeze(1), rest], -1)


def mlp(case: Case, layer: dict[str, Any], x: Tensor) -> Tensor:
    act = F.silu if case.shape.gate == "silu" else lambda v: F.gelu(v, approximate="tanh")
    if not case.experts:
        if case.joined:
            gate, up = F.linear(x, *layer["gate_up"]).chunk(2, -1)
        else:
            gate, up = F.linear(x, *layer["gate"]), F.linear(x, *layer["up"])
        return F.linear(act(gate) * up, *layer["down"])
    weights, chosen = F.linear(x, layer["router"]).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True) if case.normalized else weights
    stack, down = layer["experts_gate_up"][0][chosen], layer["experts_down"][0][chosen]
    gate, up = torch.einsum("btenk,btk->bten", stack, x).chunk(2, -1)
    return (torch.einsum("betnk,betk->betn", down, act(gate) * up) * weights.unsqueeze(-1)).sum(-2)


def expected(
    case: Case, layers: list[dict[str, Any]], x: Tensor, angles: Any, keys: Any, values: Any, seen: Tensor
) -> Any:
    """x after all layers, and the keys and values with the new ones behind; seen: bool [B, T, tokens]."""
    s, (B, T, _) = case.shape, x.shape
    for i, layer in enumerate(layers[:-1]):
        h = rms(x, layer["norm input"], s.eps)
        if case.joined:
            q, k, v = F.linear(h, *layer["qkv"]).split([s.heads * s.head_dim, *[s.kv_heads * s.head_dim] * 2], -1)
        else:
            q, k, v = (F.linear(h, *layer[role]) for role in "qkv")
        q, k, v = (t.view(B, T, -1, s.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = rms(q, layer.get("norm q"), s.eps), rms(k, layer.get("norm k"), s.eps)
        q, k = (turned(t, *angles[i % 2]) for t in (q, k))
        keys[i], values[i] = torch.cat([keys[i], k], 2), torch.cat([values[i], v], 2)
        groups = s.heads // s.kv_heads
        scores = q @ keys[i].repeat_interleave(groups, 1).transpose(-1, -2) * s.scaling
        if s.softcap:
            scores = s.softcap * (scores / s.softcap).tanh()
        scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
        out = (scores @ values[i].repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
        x = x + rms(F.linear(out, *layer["o"]), layer.get("norm attention_out"), s.eps)
        x = x + rms(mlp(case, layer, rms(x, layer["norm mlp"], s.eps)), layer.get("norm mlp_out"), s.eps)
    return rms(x, layers[-1]["norm final"], s.eps), keys, values


def compare(case: Case, batch: int = 1, tokens: int = 1, past: int = 9, padded: bool = False) -> None:
    decoder, layers = make(case)
    s, generator = case.shape, torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(case.dtype)

    x = random(batch, tokens, s.hidden)
    tables = [(random(40, case.width).float(), random(40, case.width).float()) for _ in range(2)]
    positions = torch.randint(40, (batch, tokens), generator=generator)
    angles = [(cos[positions], sin[positions]) for cos, sin in tables]
    room = past + tokens + 5
    keys, values = ([random(batch, s.kv_heads, room, s.head_dim) for _ in range(s.layers)] for _ in range(2))
    old = [[t[:, :, :past].float() for t in ts] for ts in (keys, values)]
    mask = None
    place = torch.arange(past + tokens)
    query = past + torch.arange(tokens)
    seen = place <= query.unsqueeze(1)
    if case.window:
        seen &= place > query.unsqueeze(1) - case.window
    seen = seen.expand(batch, -1, -1).clone()
    if padded:
        mask = torch.ones(batch, past + tokens, dtype=torch.bool)
        for b in range(batch):
            mask[b, : b + 2] = False
        seen &= mask.unsqueeze(1)
    got = decoder.run(x, tables, keys, values, positions, mask, [past] * s.layers, [0] * s.layers, (0, s.layers), True)
    want, all_keys, all_values = expected(case, layers, x.float(), angles, *old, seen)
    assert got is not None and got.dtype == case.dtype and got.shape == x.shape
    tolerance = 2e-4 if case.dtype == torch.float32 else 2e-2
    for a, b in [(got, want), *zip(keys, all_keys, strict=True), *zip(values, all_values, strict=True)]:
        a = a[:, :, : past + tokens] if a.ndim == 4 else a
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("case", [Case(), Case(window=9, dtype=torch.bfloat16)], ids=str)
def test_sequences_with_caches_of_their_own_equal_each_alone(case: Case, tokens: int) -> None:
    decoder, _ = make(case)
    s, pasts, generator = case.shape, [0, 700, 33, 5], torch.Generator().manual_seed(3)
    x = torch.randn(len(pasts), tokens, s.hidden, generator=generator).to(case.dtype)
    tables = [tuple(torch.randn(800, case.width, generator=generator) for _ in range(2)) for _ in range(2)]
    # of each sequence, of each layer: keys, values
    caches = [
        [
            torch.randn(2, 1, s.kv_heads, past + 10, s.head_dim, generator=generator).to(case.dtype)
            for _ in range(s.layers)
        ]
        for past in pasts
    ]

    def run(rows: list[int], caches: Any) -> Tensor:
        each = [caches[b][i] for i in range(s.layers) for b in rows]
        lengths = [pasts[b] for _ in range(s.layers) for b in rows]
        got = decoder.run(
            x[rows], tables, [c[0] for c in each], [c[1] for c in each], None, None, lengths, [0] * len(each),
            (0, s.layers), True,
        )  # fmt: skip
        assert got is not None
        return got

    alone_caches = copy.deepcopy(caches)
    alone = torch.cat([run([b], alone_caches) for b in range(len(pasts))])
    together = run(list(range(len(pasts))), caches)
    tolerance = 1e-5 if case.dtype == torch.float32 else 1e-2  # other kernels serve one row
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    for of_each, of_alone in zip(caches, alone_caches, strict=True):
        for a, b in zip(of_each, of_alone, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 1), (1, 1, 700), (3, 1, 40), (2, 3, 33), (1, 8, 0)])
def test_layers_equal_those_written_out(dtype: torch.dtype, batch: int, tokens: int, past: int) -> None:
    compare(Case(dtype=dtype), batch, tokens, past)


@pytest.mark.parametrize(
    "case",
    [
        Case(joined=True),
        Case(all_norms=True, shape=SHAPE._replace(gate="gelu_tanh", softcap=3.0)),
        Case(bias=True, window=5),
        Case(window=5, joined=True, bias=True, all_norms=True),
        Case(width=16),
        Case(experts=5),
        Case(experts=3, normalized=False, all_norms=True),
        Case(config=HqqConfig(3)),
        Case(config=HqqConfig(4, 20, **META)),
        Case(config=HqqConfig(2, 16, **META), joined=True),
        Case(config=HqqConfig(8, 64)),
        Case(config=HqqConfig(5, 7)),
        Case(config=HqqConfig(4, 32, format="nf4"), joined=True),
        Case(config=HqqConfig(4, 32, format="codebook")),
        Case(config=HqqConfig(6, 16, format="fp6")),
        Case(dense=("down",)),
        Case(dense=("q", "up", "o"), dtype=torch.bfloat16, bias=True),
        Case(dense=("qkv", "gate_up", "o", "down"), dtype=torch.float16, joined=True),
        Case(dense=("experts_gate_up",), experts=3),
        Case(dense=("experts_down",), experts=3, dtype=torch.bfloat16),
        Case(config=HqqConfig(4, 16, rotation=True), bias=True),
        Case(config=HqqConfig(4, 32, solver="column_scaled", rotation=True), dense=("k",)),
        Case(config=HqqConfig(4, 16, rotation=True), experts=3),
        Case(config=HqqConfig(4, 16, axis=0), bias=True),
        Case(config=HqqConfig(4, 16, axis=0), dtype=torch.bfloat16, joined=True),
        Case(config=HqqConfig(6, 16, axis=0, format="fp6")),
        Case(config=HqqConfig(4, 16, axis=0, rotation=True), dense=("up",)),
        Case(shape=SHAPE._replace(heads=5, kv_heads=5, head_dim=48), width=48),
        Case(shape=SHAPE._replace(heads=14, kv_heads=2, head_dim=16), width=16),
        Case(shape=SHAPE._replace(hidden=576, intermediate=1536, layers=1)),
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_equals_the_one_written_out(case: Case) -> None:
    compare(case, batch=2, tokens=2, past=70, padded=True)


@pytest.mark.parametrize(("nbits", "axes", "rotation"), [(4, (0, 1), None), (8, (1, 1), "both"), (2, (0, 0), "keys")])
@pytest.mark.parametrize(("batch", "tokens", "blocks"), [(1, 1, 1), (2, 3, 5), (1, 1, 40)])
def test_packed_keys_and_values_are_read_as_what_they_stand_for(
    nbits: int, axes: tuple[int, int], rotation: str | None, batch: int, tokens: int, blocks: int
) -> None:
    case, block, recent = Case(), 32, 7
    decoder, layers = make(case)
    s, generator = case.shape, torch.Generator().manual_seed(2)
    x = torch.randn(batch, tokens, s.hidden, generator=generator)
    tables = [(torch.randn(2000, 32, generator=generator), torch.randn(2000, 32, generator=generator))] * 2
    config = transformers.LlamaConfig(num_hidden_layers=s.layers)
    cache = HqqQuantizedCache(config, nbits, *axes, q_group_size=block, residual_length=recent, rotation=rotation)
    old: list[list[Tensor]] = [[], []]
    for i in range(s.layers):
        states = [
            torch.randn(batch, s.kv_heads, blocks * block + recent, s.head_dim, generator=generator) for _ in "kv"
        ]
        cache.update(*states, i)
        layer = cache.layers[i] = adopt(cache.layers[i])
        packed = layer.packed.dense(s.head_dim, torch.float32)
        for which, dense in enumerate(old):
            dense.append(torch.cat([packed[which], (layer.keys, layer.values)[which]], 2))
    past = blocks * block + recent
    buffers = [[torch.zeros(batch, s.kv_heads, recent + tokens, s.head_dim) for _ in range(s.layers)] for _ in "kv"]
    for i, layer in enumerate(cache.layers):
        buffers[0][i][:, :, :recent], buffers[1][i][:, :, :recent] = layer.keys, layer.values
    mask = torch.ones(batch, past + tokens, dtype=torch.bool)
    mask[:, : block + 3] = blocks == 1
    seen = (torch.arange(past + tokens) <= past + torch.arange(tokens).unsqueeze(1)) & mask.unsqueeze(1)
    got = decoder.run(
        x, tables, *buffers, None, mask, [recent] * s.layers, [0] * s.layers, (0, s.layers), True,
        [layer.packed for layer in cache.layers],
    )  # fmt: skip
    places = past + torch.arange(tokens).expand(batch, -1)
    angles = [(cos[places], sin[places]) for cos, sin in tables]
    want, _, _ = expected(case, layers, x, angles, *old, seen)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * want.abs().max().item())


def test_results_do_not_depend_on_the_number_of_threads_beyond_rounding() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            compare(replace(Case(), experts=4), batch=2, tokens=1, past=900)
            compare(Case(), past=2000)
    finally:
        torch.set_num_threads(before)


def test_several_decoders_run_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda past: compare(Case(), past=past), [3, 50, 400, 5, 60, 300] * 3))


def test_activations_that_no_kernel_serves_give_none_for_int8_and_nan_otherwise() -> None:
    s = SHAPE
    for digits, want in ((1, True), (3, False)):
        other = CompiledDecoder(s._replace(layers=1))
        other.set_layer(0, 0, 0)
        for role in ("input", "mlp"):
            other.norm(0, role, torch.ones(s.hidden))  # type: ignore[arg-type]
        for role, n, k in (("qkv", 320, 96), ("o", 96, 192), ("gate_up", 224, 96), ("down", 96, 112)):
            w = HQQTensor.from_hp(torch.randn(n, k), HqqConfig(4, 32))
            other.linear(0, role, w.operand(), None, None, digits, 0)  # type: ignore[arg-type]
        x = torch.full((1, 1, s.hidden), torch.nan)
        cache = torch.zeros(1, 2, 4, 32)
        angles = [(torch.ones(1, 32), torch.ones(1, 32))]
        got = other.run(x, angles, [cache], [cache.clone()], None, None, [0], [0], (0, 1), True)
        assert (got is None) == want and (want or got.isnan().all())  # type: ignore[union-attr]


def run_with(decoder: CompiledDecoder, **changes: Any) -> Any:
    s = SHAPE
    given: dict[str, Any] = {
        "x": torch.randn(1, 1, s.hidden),
        "angles": [(torch.ones(9, 32), torch.ones(9, 32))] * 2,
        "keys": [torch.zeros(1, 2, 8, 32) for _ in range(2)],
        "values": [torch.zeros(1, 2, 8, 32) for _ in range(2)],
        "positions": None,
        "mask": None,
        "lengths": [4, 4],
        "firsts": [0, 0],
        "layers": (0, 2),
        "verify": True,
    }
    return decoder.run(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.randn(1, 1, 95)}, r"input must be a contiguous floating-point \[batch, tokens, 96\]"),
        ({"x": torch.randn(1, 1, 192)[..., ::2]}, "contiguous"),
        ({"x": torch.zeros(1, 1, 96, dtype=torch.int64)}, "floating-point"),
        ({"x": torch.zeros(1, 0, 96)}, "input must be"),
        ({"angles": []}, "cosines"),
        ({"angles": [(torch.ones(9, 32), torch.ones(9, 32))]}, "layer 1 needs more cosines"),
        ({"angles": [(torch.ones(9, 34), torch.ones(9, 34))] * 2}, "up to 32"),
        ({"angles": [(torch.ones(9, 32), torch.ones(9, 16))] * 2}, "one shape"),
        ({"angles": [(torch.ones(9, 32).bfloat16(), torch.ones(9, 32).bfloat16())] * 2}, "contiguous float32"),
        ({"positions": torch.zeros(1, 2, dtype=torch.int64)}, r"position_ids must be integers \[1, 1\]"),
        ({"positions": torch.zeros(1, 1)}, "position_ids must be integers"),
        ({"keys": [torch.zeros(1, 2, 8, 32)]}, "2 layers of 1 sequences need a cache for each layer.*got 1"),
        ({"keys": [torch.zeros(1, 3, 8, 32)] * 2}, r"a cache must be \[1, 2, capacity, 32\]"),
        ({"keys": [torch.zeros(1, 2, 8, 32).bfloat16()] * 2}, "of the input's dtype"),
        ({"keys": [torch.zeros(1, 2, 32, 8).transpose(2, 3)] * 2}, "whole heads"),
        ({"keys": [torch.zeros(1, 2, 16, 32)] * 2}, "the same strides"),
        ({"lengths": [8, 4]}, "a cache of 8 tokens has no room for 1 behind 8"),
        ({"lengths": [4]}, "as many values, lengths and first places as keys are needed, got 2, 1 and 2 for 2"),
        (
            {
                "x": torch.randn(2, 1, 96),
                "mask": torch.ones(2, 5, dtype=torch.bool),
                "lengths": [4] * 4,
                "firsts": [0] * 4,
            }
            | {name: [torch.zeros(1, 2, 8, 32)] * 4 for name in ("keys", "values")},
            "sequences with caches of their own have no mask",
        ),
        ({"lengths": [-1, 4]}, "no room"),
        ({"firsts": [-1, 0]}, "the first token of a cache must have place 0 to 1099511627776, got -1"),
        ({"firsts": [0, 2**62]}, "must have place 0 to 1099511627776, got 4611686018427387904"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"mask must be contiguous bool or int64 \[1, 5\]"),
        ({"mask": torch.ones(1, 5)}, "mask must be contiguous bool or int64"),
        ({"layers": (0, 3)}, "layers 0 to 3 of 2"),
        ({"layers": (1, 1)}, "layers 1 to 1 of 2"),
    ],
)
def test_wrong_arguments_are_errors(changes: dict[str, Any], match: str) -> None:
    decoder, _ = make(Case())
    assert run_with(decoder) is not None
    with pytest.raises(RuntimeError, match=match):
        run_with(decoder, **changes)


def test_wrong_parts_are_errors() -> None:
    s = SHAPE
    for wrong, match in (
        ({"layers": 0}, "sizes must be 1 to"),
        ({"heads": 5}, "5 heads do not share 2"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16, got 24"),
    ):
        with pytest.raises(RuntimeError, match=match):
            CompiledDecoder(s._replace(**wrong))
    decoder = CompiledDecoder(s)
    with pytest.raises(RuntimeError, match="lacks a norm, a projection or its router"):
        run_with(decoder)
    w = HQQTensor.from_hp(torch.randn(96, 96), HqqConfig(4, 32))
    with pytest.raises(RuntimeError, match=r"o must be \[96, 192\], got \[96, 96\]"):
        decoder.linear(0, "o", w.operand(), None, None, 3, 0)
    with pytest.raises(RuntimeError, match="there is no projection 'x'"):
        decoder.linear(0, "x", w.operand(), None, None, 3, 0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="there is no layer 2"):
        decoder.set_layer(2, 0, 0)
    with pytest.raises(RuntimeError, match="there is no norm 'x'"):
        decoder.norm(0, "x", torch.ones(96))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a norm's weight must be floating-point"):
        decoder.norm(0, "input", torch.ones(95))
    with pytest.raises(RuntimeError, match="digits must be 1 to 3"):
        decoder.linear(0, "o", w.operand(), None, None, 4, 0)
    with pytest.raises(RuntimeError, match="rotation must be 0 or a power of two that divides 96, got 64"):
        decoder.linear(0, "o", w.operand(), None, None, 3, 64)
    for dense in (torch.ones(96, 200), torch.ones(96, 192).T.contiguous().T, torch.ones(96, 192, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="a dense o must be contiguous floating-point"):
            decoder.dense(0, "o", dense, None)
    with pytest.raises(RuntimeError, match="3 of 2 experts cannot be chosen"):
        decoder.router(0, torch.randn(2, 96), 3, True)


def test_weights_whose_memory_has_moved_give_none() -> None:
    decoder, w = CompiledDecoder(SHAPE._replace(layers=1)), []
    decoder.set_layer(0, 0, 0)
    for role in ("input", "mlp"):
        decoder.norm(0, role, torch.ones(96))  # type: ignore[arg-type]
    for role, n, k in (("qkv", 320, 96), ("o", 96, 192), ("gate_up", 224, 96), ("down", 96, 112)):
        w.append(HQQTensor.from_hp(torch.randn(n, k), HqqConfig(4, 32)))
        decoder.linear(0, role, w[-1].operand(), None, None, 3, 0)  # type: ignore[arg-type]
    one = {"keys": [torch.zeros(1, 2, 8, 32)], "values": [torch.zeros(1, 2, 8, 32)], "lengths": [4], "firsts": [0]}
    assert run_with(decoder, **one, layers=(0, 1)) is not None
    w[0].qdata.share_memory_()
    assert run_with(decoder, **one, layers=(0, 1)) is None


def test_a_place_without_angles_gives_none() -> None:
    decoder, _ = make(Case())
    for place, served in ((8, True), (9, False), (-1, False)):
        assert (run_with(decoder, positions=torch.tensor([[place]])) is not None) == served


def test_a_mask_of_integers_is_one_of_bools() -> None:
    decoder, _ = make(Case())
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    x = torch.randn(1, 1, SHAPE.hidden)
    a, b = (run_with(decoder, x=x, mask=m) for m in (mask, mask.bool()))
    assert torch.equal(a, b) and not torch.equal(a, run_with(decoder, x=x))
