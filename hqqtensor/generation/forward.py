"""What stands in for a base model's ``forward``: a few new tokens go through the decoder, all else as before."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from hqqtensor.generation.angles import Angles, change_with_length
from hqqtensor.generation.cache import ROOMY, CacheOfEach, RoomyQuantizedLayer, adopt, on_cpu
from hqqtensor.generation.check import checked
from hqqtensor.generation.families import FAMILIES, Family
from hqqtensor.generation.layers import NotServed, dtype_of
from hqqtensor.generation.watch import Watch
from hqqtensor.integrations.transformers.cache import HqqCacheLayer, HqqQuantizedCache
from hqqtensor.ops.backend import decoder_maker
from hqqtensor.ops.decoder import Decoder

MOST_TOKENS = 8  # of one sequence
MOST_ROWS = 16  # of all sequences together

_HARMLESS = {
    "return_dict": (None, True), "output_attentions": (None, False), "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
}  # fmt: skip
"""Keyword arguments of ``forward`` that change nothing if they have one of these values."""


class DecoderForward:
    """Called instead of ``base.forward``; an attribute of the base model, removed to undo it.

    The decoder is made at the first call that it serves, and made again when the model has changed. Where the model
    cannot be served any more, ``why_not`` says so and every call takes transformers' own way. ``decoded_calls`` and
    ``decoded_tokens`` (of all sequences) count what went through the decoder.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base: Any = base
        self.family: Family = FAMILIES[type(base).__name__]
        self.why_not: str | None = None
        self.decoded_calls = self.decoded_tokens = 0
        self._decoder: Decoder | None = None
        self._watch: Watch | None = None
        self._angles: Angles | None = None
        self._verify = True  # whether all of the model is to be looked at before the next token

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecoderForward":
        return DecoderForward(copy.deepcopy(self.base, memo))

    def __reduce__(self) -> Any:
        return DecoderForward, (self.base,)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's ``forward``; with a ``CacheOfEach`` one token of each of its sequences."""
        if isinstance(past_key_values, CacheOfEach):
            return self._decode_each(input_ids, past_key_values, use_cache, kwargs)
        if type(past_key_values) in (DynamicCache, HqqQuantizedCache) and not torch.is_grad_enabled():
            out = self._decode(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs
            )
            if out is not None:
                return out
            self._give_room(past_key_values)
        self._verify = True
        forward = type(self.base).forward.__get__(self.base)
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _decode(
        self, input_ids: Tensor | None, attention_mask: Any, position_ids: Tensor | None, cache: Any,
        inputs_embeds: Tensor | None, use_cache: bool | None, kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The output, or None where the call is not one for the decoder."""
        new = input_ids if inputs_embeds is None else inputs_embeds
        if new is None or new.ndim < 2 or new.shape[1] > MOST_TOKENS or new.shape[0] * new.shape[1] > MOST_ROWS:
            return None
        if use_cache is False or cache.offloading or not self._plain_call(kwargs):
            return None
        layers = self._roomy(cache)
        if layers is None or not self._ready():
            return None
        batch, tokens = new.shape[:2]
        past = layers[0].get_seq_length()
        if attention_mask is not None and not _is_plain_mask(attention_mask, batch, past + tokens):
            return None
        x = self.base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if layers[0].batch != batch or x.dtype is not layers[0].dtype:
            return None
        assert self._angles is not None
        return self._run(x, attention_mask, self._angles.of(position_ids, past, tokens), layers, cache)

    def _decode_each(
        self, input_ids: Tensor | None, each: CacheOfEach, use_cache: bool | None, kwargs: dict[str, Any]
    ) -> Any:
        """The output for tokens ``[B, 1]`` of sequences with caches of their own: together, or where the decoder does
        not serve them one after the other."""
        count = len(each.caches)
        if input_ids is None or input_ids.shape != (count, 1):
            got = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"{count} sequences with caches of their own take input_ids [{count}, 1], got {got}")
        layers = self._roomy_each(each, input_ids, kwargs)
        if layers is not None and self._ready():
            x = self.base.embed_tokens(input_ids)
            if x.dtype is layers[0].dtype:
                assert self._angles is not None
                positions = torch.tensor([[cache.get_seq_length()] for cache in each.caches])
                angles = self._angles.of(positions, int(positions.max()), 1)
                out = self._run(x, None, angles, layers, each)
                if out is not None:
                    return out
        outputs = [
            self(input_ids[i : i + 1], past_key_values=cache, use_cache=use_cache, **kwargs)
            for i, cache in enumerate(each.caches)
        ]
        hidden = torch.cat([output.last_hidden_state for output in outputs])
        return self._output_type()(last_hidden_state=hidden, past_key_values=each)

    def _roomy_each(self, each: CacheOfEach, input_ids: Tensor, kwargs: dict[str, Any]) -> list[Any] | None:
        """The layers of all caches, those of the first layer first; None where the decoder serves no such call."""
        if torch.is_grad_enabled() or len(each.caches) > MOST_ROWS or not self._plain_call(kwargs):
            return None
        if change_with_length(self.base):  # a token would get those of the longest sequence
            return None
        of_each = [
            self._roomy(cache) if type(cache) is DynamicCache and not cache.offloading else None
            for cache in each.caches
        ]
        if any(layers is None or layers[0].batch != 1 for layers in of_each):
            return None
        return [layer for same in zip(*of_each, strict=True) for layer in same]  # type: ignore[arg-type]

    def _run(
        self, x: Tensor, mask: Tensor | None, angles: tuple[list[tuple[Tensor, Tensor]], Tensor | None],
        layers: list[Any], cache: Any,
    ) -> Any:  # fmt: skip
        tokens = x.shape[1]
        buffers = [layer.make_room(tokens) for layer in layers]
        assert self._decoder is not None
        tables, positions = angles
        hidden = self._decoder.run(
            x.contiguous(),
            tables,
            [keys for keys, _ in buffers],
            [values for _, values in buffers],
            positions,
            None if mask is None else mask.contiguous(),
            [layer.end for layer in layers],
            [layer.first for layer in layers],
            (0, len(self.base.layers)),
            self._verify,
            [layer.packed for layer in layers] if layers[0].packed is not None else None,
        )
        if hidden is None:
            self._watch = None  # memory may have moved: made again for the next token
            return None
        self._verify = False
        self.decoded_calls += 1
        self.decoded_tokens += x.shape[0] * tokens
        for layer in layers:
            layer.advance(tokens)
        return self._output_type()(last_hidden_state=hidden, past_key_values=cache)

    def _output_type(self) -> Any:
        return MoeModelOutputWithPast if self.family.experts else BaseModelOutputWithPast

    def _plain_call(self, kwargs: dict[str, Any]) -> bool:
        """Whether nothing is asked for but hidden states, and no other code looks on."""
        config: Any = self.base.config
        return (
            all(value in _HARMLESS[name] if name in _HARMLESS else value is None for name, value in kwargs.items())
            and not config.output_attentions
            and not config.output_hidden_states
            and not getattr(config, "output_router_logits", False)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and decoder_maker("cpu") is not None
        )

    def _give_room(self, cache: Any) -> None:
        """Let the prompt write its keys and values to where the tokens after it will."""
        if len(cache.layers) != len(self.base.layers) or cache.offloading:
            return
        kinds = set(map(type, cache.layers))
        # The decoder does not serve packed layers beside others: the model's own attention gets them dense.
        left = {HqqCacheLayer} if len(kinds) > 1 else set()
        cache.layers[:] = [layer if type(layer) in left else adopt(layer) or layer for layer in cache.layers]

    def _roomy(self, cache: Any) -> list[Any] | None:
        """The layers of the cache, made roomy; None where they are of another kind or hold nothing yet."""
        layers = cache.layers
        if len(layers) != len(self.base.layers):
            return None
        self._give_room(cache)
        kinds = set(map(type, layers))
        if not kinds <= set(ROOMY) or (RoomyQuantizedLayer in kinds and len(kinds) > 1):  # packed ones beside others
            return None
        return layers if layers[0].is_initialized and on_cpu(layers, dtype_of(self.base)) else None

    def _ready(self) -> bool:
        """Whether there is a decoder of the model as it is now."""
        watch = self._watch
        # Where something was registered, `unchanged` says whether it belongs to this model.
        same = watch is not None and ((not self._verify and watch.quick()) or watch.unchanged())
        return (same or self._rebuild()) and self._decoder is not None

    def why_it_cannot(self) -> str | None:
        """None, or why the model as it is cannot be served."""
        if not self._rebuild():
            return "it is in training mode, or has hooks: call model.eval() and remove them first"
        self._watch = None  # made anew for the first token: weights are moved after this
        return self.why_not

    def _rebuild(self) -> bool:
        """False while the model is in a state that no decoder can have: hooks, or training."""
        watch = Watch(self.base, ("layers", "norm", "rotary_emb"))
        if not watch.unchanged():
            return False
        try:
            self._decoder, self.why_not = checked(self.base, self.family), None
            self._angles = Angles(self.base, self.family)
        except NotServed as reason:
            self._decoder, self.why_not = None, str(reason)
        self._watch = watch
        return True


def decoder_forward(model: nn.Module) -> DecoderForward | None:
    """What ``prepare_for_generation_`` put into the model; None for a model that is not prepared."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return next((forward for forward in forwards if isinstance(forward, DecoderForward)), None)


def _is_plain_mask(mask: Any, batch: int, length: int) -> bool:
    """Whether a mask says of each token of each sequence whether it is seen."""
    return isinstance(mask, Tensor) and mask.shape == (batch, length) and mask.dtype in (torch.bool, torch.int64)
