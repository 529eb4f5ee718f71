"""``attn_implementation="hqqtensor"``: attention of a few new tokens by ``hqqtensor::attention``, of prompts by torch.

The operator serves the CPU without gradients. Prompts, other devices and training take transformers' "sdpa", or plain
code where a model has soft caps or sinks, which "sdpa" does not have.
"""

from typing import Any

import torch
from torch import Tensor

from hqqtensor.integrations.transformers.joined_states import JoinedStates, packed_of
from hqqtensor.ops.attention import attention, plain_attention

NAME = "hqqtensor"
MOST_TOKENS = 8
"""New tokens of one sequence that the operator serves; torch's own attention is made for more."""


def install() -> None:
    """Register the attention and its masks, which are those of "sdpa", with transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query ``[B, heads, T, D]``, key, value ``[B, kv_heads, S, D]`` to ``[B, T, heads, D]``,
    and no weights. attention_mask: bool ``[B, 1, T, S]`` as of "sdpa"; None for all, or for the causal one of a prompt.
    """
    if isinstance(key, JoinedStates) and isinstance(value, JoinedStates):
        few = query.shape[2] <= MOST_TOKENS and _is_served(
            query, key.recent, value.recent, attention_mask, dropout, kwargs
        )
        if few and (attention_mask is not None or query.shape[2] == 1):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            states = (key.recent, value.recent, attention_mask, s_aux, scale, softcap or 0.0, packed_of(key, value))
            return attention(query, *states), None
        key, value = key.dense(), value.dense()
    few = query.shape[2] <= MOST_TOKENS and _is_served(query, key, value, attention_mask, dropout, kwargs)
    if not few and not softcap and s_aux is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout or kwargs.get("position_bias") is not None:
        raise ValueError(
            f"attention {NAME!r} has no dropout and no position bias beside soft caps or sinks: use 'eager'"
        )
    tokens, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and tokens > 1:  # a prompt, perhaps in a cache with room behind it
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    compute = attention if few else plain_attention
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return compute(query, key, value, attention_mask, s_aux, scale, softcap or 0.0), None


def _is_served(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> bool:
    """Whether the operator takes these tensors and is made for them."""
    return (
        query.device.type == "cpu"
        and dropout == 0
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and key.shape == value.shape
        and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1))
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None  # a paged cache, which the attention itself has to update
    )
