"""``hqqtensor::attention``: a few new tokens against keys and values of a cache, which are read where they lie.

The compiled kernel serves float32, bfloat16 and float16 on CPUs with heads of a multiple of 16 numbers; all else, and
any call while another backend is chosen, takes the plain code here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hqqtensor.ops.backend import serves
from hqqtensor.ops.definitions import LIBRARY, OPS, define, remembered
from hqqtensor.ops.packed_states import PackedStates

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scaling, float softcap, "
    "Tensor[]? packed=None, int[] packed_settings=[], Tensor? signs=None) -> Tensor"
)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None,
    scaling: float = 1.0, softcap: float = 0.0, packed: PackedStates | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query ``[B, heads, T, D]`` over key and value ``[B, kv_heads, S, D]`` of its dtype: ``[B, T, heads,
    D]``. It has no gradient.

    Head h reads head h * kv_heads / heads of the keys. mask: bool ``[B or 1, 1, T, S]``, False for tokens that are not
    seen; a token that sees none gives zeros. sinks: ``[heads]``, a score of each head that is part of the softmax and
    has no value. Scores s are ``scaling`` times the products, and become ``softcap * tanh(s / softcap)`` where softcap
    is not 0. packed: tokens before those of key and value, which S then counts too. RuntimeError where shapes, dtypes
    or devices do not fit.
    """
    if packed is None:
        return OPS.attention(query, key, value, mask, sinks, scaling, softcap)
    states = (packed.tensors, packed.settings, packed.signs)
    return OPS.attention(query, key, value, mask, sinks, scaling, softcap, *states)


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, packed: PackedStates | None
) -> None:
    def require(condition: bool, wanted: str, *got: Tensor) -> None:
        if not condition:
            shown = " and ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in got)
            raise RuntimeError(f"attention: {wanted}, got {shown}")

    wanted = "query must be floating-point [batch, heads, tokens, dim]"
    require(query.ndim == 4 and query.is_floating_point() and query.numel() > 0, wanted, query)
    B, H, T, D = query.shape
    same = all(
        t.ndim == 4 and t.dtype == query.dtype and t.shape[0] == B and t.shape[3] == D and t.numel() > 0
        for t in (key, value)
    )
    wanted = f"key and value must be [{B}, heads, tokens, {D}] of the query's dtype, with heads that {H} share"
    require(same and key.shape == value.shape and H % key.shape[1] == 0, wanted, key, value)
    if mask is not None:
        S = key.shape[2] + (0 if packed is None else packed.tokens)
        fits = mask.dtype == torch.bool and tuple(mask.shape) in ((B, 1, T, S), (1, 1, T, S))
        require(fits, f"mask must be bool [{B} or 1, 1, {T}, {S}]", mask)
    if sinks is not None:
        fits = sinks.is_floating_point() and tuple(sinks.shape) == (H,)
        require(fits, f"sinks must be floating-point [{H}]", sinks)
    for t in (key, value, mask, sinks):
        if t is not None and t.device != query.device:
            raise RuntimeError(f"attention: all tensors must be on {query.device}, got one on {t.device}")


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """``attention`` by torch's own operators, in float32 at least; it has a gradient."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(1, (key.shape[1], -1))  # [B, kv_heads, group, T, D]
    scores = q @ key.to(dtype).unsqueeze(2).transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value.to(dtype).unsqueeze(2)).flatten(1, 2).transpose(1, 2).contiguous().to(query.dtype)


def _states(tensors: Sequence[Tensor] | None, settings: Sequence[int], signs: Tensor | None) -> PackedStates | None:
    """The operator's last arguments as one; RuntimeError where they cannot be packed states."""
    if not tensors:
        return None
    if len(tensors) != 6 or len(settings) != 6:
        raise RuntimeError(
            f"packed states are 6 tensors of each cache with 6 settings, got {len(tensors)} and {len(settings)}"
        )
    nbits, group_size, axis_key, axis_value, keys, values = settings
    return PackedStates(tuple(tensors), nbits, group_size, axis_key, axis_value, bool(keys), bool(values), signs)


def _from_registry(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float,
    softcap: float, tensors: Sequence[Tensor] | None = None, settings: Sequence[int] = (), signs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """By the compiled kernel if it is the backend chosen and serves the call, else by the plain code."""
    packed = _states(tensors, settings, signs)
    _check(query, key, value, mask, sinks, packed)
    if query.device.type == "cpu" and serves("cpu", "cpu"):
        rest = (mask, sinks, scaling, softcap, tensors, settings, signs)
        out = OPS._cpu_attention(query, key, value, *rest)
        if out is not None:
            return out
    if packed is not None:
        old = packed.dense(query.shape[-1], query.dtype)
        key, value = (torch.cat(pair, 2) for pair in zip(old, (key, value), strict=True))
    return plain_attention(query, key, value, mask, sinks, scaling, softcap)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float,
    softcap: float, tensors: Sequence[Tensor] | None = None, settings: Sequence[int] = (), signs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(query, key, value, mask, sinks, _states(tensors, settings, signs))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


for _name in ("attention", "registry_attention"):
    define(_name, _SCHEMA, remembered(_from_registry), _fake)
LIBRARY.define(f"_cpu_attention{_SCHEMA}?")  # None where the compiled kernel does not serve
LIBRARY.impl("registry_attention", torch.library.fallthrough_kernel, "Autograd")
