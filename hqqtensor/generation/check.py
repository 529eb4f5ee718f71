"""A decoder's layers against transformers' own, on random numbers, before a model is served."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hqqtensor.generation.angles import Angles, types_of
from hqqtensor.generation.cache import adopt
from hqqtensor.generation.families import Family
from hqqtensor.generation.layers import NotServed, build, dtype_of
from hqqtensor.ops.decoder import Decoder

PAST = 5  # tokens in the cache of the layer that is checked
MOST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""By dtype: the norm of the difference over that of what the layer adds to its input."""


@torch.no_grad()
def checked(base: Any, family: Family) -> Decoder:
    """The decoder of a base model; ``NotServed`` where none can be made, or where a layer of a kind gives other results
    than its own code."""
    dtype, training = dtype_of(base), base.training
    if dtype not in MOST_ERROR:
        raise NotServed(f"it computes in {dtype}, which must be one of {[str(d) for d in MOST_ERROR]}")
    if base.norm.weight.device.type != "cpu":
        raise NotServed(f"it is on {base.norm.weight.device}; only models on the CPU are served")
    decoder = build(base, family)
    types = getattr(base.config, "layer_types", None) or ["full_attention"] * len(base.layers)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, base.norm.weight.shape[0], generator=generator).to(dtype)
    base.eval()
    try:
        kinds = [(kind, *map(type, layer.modules())) for kind, layer in zip(types, base.layers, strict=True)]
        for i in sorted({kinds.index(kind) for kind in kinds}):
            own, ours = _own(base, family, i, x), _ours(base, decoder, family, i, x)
            if ours is None:
                raise NotServed(f"layers.{i} does not serve random numbers")
            error = float((ours - own).float().norm() / (own - x).float().norm())
            if not error <= MOST_ERROR[dtype]:
                kind = type(base.layers[i]).__name__
                raise NotServed(f"layers.{i}, a {kind}, would give other results: relative error {error:.2g}")
    finally:
        base.train(training)
    return decoder


def _cache(base: Any, i: int, dtype: torch.dtype) -> DynamicCache:
    """A cache whose layer ``i`` holds a few random tokens."""
    cache, config = DynamicCache(config=base.config), base.config
    generator = torch.Generator().manual_seed(1)
    size = (1, config.num_key_value_heads, PAST, base.layers[i].self_attn.head_dim)
    keys, values = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    cache.update(keys, values, i)
    return cache


def _own(base: Any, family: Family, i: int, x: Tensor) -> Tensor:
    """The layer's own output, by transformers' plain attention."""
    place, types = torch.tensor([[PAST]]), types_of(base.config, family)
    kind = base.config.layer_types[i] if family.rope_by_type else None
    assert kind in types
    angles = base.rotary_emb(x, place) if kind is None else base.rotary_emb(x, place, kind)
    out = base.layers[i](
        x, attention_mask=None, position_ids=place, position_embeddings=angles,
        past_key_values=_cache(base, i, x.dtype), use_cache=True,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return base.norm(out) if i == len(base.layers) - 1 else out  # the decoder's last layer has the final norm behind it


def _ours(base: Any, decoder: Any, family: Family, i: int, x: Tensor) -> Tensor | None:
    layer = adopt(_cache(base, i, x.dtype).layers[i])
    assert layer is not None
    keys, values = layer.make_room(1)
    tables, places = Angles(base, family).of(None, PAST, 1)
    return decoder.run(x, tables, [keys], [values], places, None, [layer.end], [layer.first], (i, i + 1), True)
