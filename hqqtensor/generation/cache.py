"""Layers of transformers' dynamic cache whose keys and values lie in tensors with room for more."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hqqtensor.generation.packed_blocks import PackedBlocks
from hqqtensor.integrations.transformers.attention import MOST_TOKENS
from hqqtensor.integrations.transformers.cache import MOST_ROTATED_BITS, HqqCacheLayer, HqqQuantizedCache
from hqqtensor.integrations.transformers.joined_states import JoinedStates
from hqqtensor.ops.backend import decoder_maker
from hqqtensor.ops.packed_states import PackedStates
from hqqtensor.tensor import HQQTensor

LEAST_ROOM = 256  # tokens that fit beyond those that a cache is made for
MOST_ROOM = 4096


def _empty(sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for keys or values; on a CPU of the kind that the kernels read fastest."""
    make = decoder_maker("cpu") if like.device.type == "cpu" else None
    return like.new_empty(sizes) if make is None else make.empty(sizes, like.dtype)


class _Roomy:
    """Keys and values ``[B, H, T, D]`` are the last tokens before ``end`` of buffers ``[B, H, capacity, D]``.

    To transformers' own code ``keys`` and ``values`` are plain tensors, which it may replace by others (to crop, to
    reorder beams); the next token then goes into new buffers.
    """

    buffers: tuple[Tensor, Tensor] | None = None
    start = end = 0
    _loose: tuple[Tensor | None, Tensor | None] = (None, None)  # keys and values that lie in no buffer
    packed: Any = None  # keys and values of older tokens, where there are some

    def _get(self, which: int) -> Tensor | None:
        if self.buffers is None:
            return self._loose[which]
        return self.buffers[which][:, :, self.start : self.end]

    def _set(self, which: int, value: Tensor | None) -> None:
        other = self._get(1 - which)
        self.buffers = None
        self._loose = (value, other) if which == 0 else (other, value)

    keys = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    values = property(lambda self: self._get(1), lambda self, value: self._set(1, value))

    @property
    def batch(self) -> int:
        """Sequences."""
        held = self._loose[0] if self.buffers is None else self.buffers[0]
        return 0 if held is None else held.shape[0]

    def make_room(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The buffers, in which ``tokens`` more fit behind ``end``."""
        if self.buffers is None or self.end + tokens > self.buffers[0].shape[2]:
            keys, values = self.keys, self.values
            length = keys.shape[2]
            capacity = length + tokens + min(max((length + tokens) // 2, LEAST_ROOM), MOST_ROOM)
            made = []
            for old in (keys, values):
                new = _empty((*old.shape[:2], capacity, old.shape[3]), old)
                new[:, :, :length] = old
                made.append(new)
            self.buffers, self._loose = (made[0], made[1]), (None, None)
            self.start, self.end = 0, length
        return self.buffers

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put new states behind the old ones."""
        tokens = key_states.shape[2]
        for buffer, states in zip(self.make_room(tokens), (key_states, value_states), strict=True):
            buffer[:, :, self.end : self.end + tokens] = states
        self.advance(tokens)

    def advance(self, tokens: int) -> None:
        """``tokens`` more have been written behind ``end``."""
        self.end += tokens

    @property
    def first(self) -> int:
        """The place in the sequence of the first token of the buffers, counted from the packed ones."""
        return 0


class RoomyLayer(_Roomy, DynamicLayer):
    """``DynamicLayer``, to which a token is added in place."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new states; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.batch == 0:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._write(key_states, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        if self.buffers is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self.end = max(self.end + tokens_to_remove, 0)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.buffers is None else self.end - self.start


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer``, to which a token is added in place: the buffers hold a few windows of tokens."""

    def make_room(self, tokens: int) -> tuple[Tensor, Tensor]:
        if self.buffers is not None and self.end + tokens > self.buffers[0].shape[2] and not self.record_past:
            self.keys, self.values = self.keys, self.values  # those in the window alone go into new buffers
        return super().make_room(tokens)

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self.cumulative_length += tokens
        if not self.record_past:
            self.start = max(self.start, self.end - self.sliding_window + 1)

    @property
    def first(self) -> int:
        """The place in the sequence of the first token of the buffers."""
        return self.cumulative_length - self.end


class RoomyQuantizedLayer(_Roomy, HqqCacheLayer):
    """``HqqCacheLayer``, whose recent tokens lie in the buffers, and whose packed ones have room for more; they are
    read as they are, by the decoder and by attention "hqqtensor"."""

    _blocks: tuple[PackedBlocks | None, PackedBlocks | None] = (None, None)
    _shown: tuple[Any, PackedStates] | None = None  # the packed keys of which `packed` was made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new states; all keys and values. Of a few tokens behind packed ones: as ``JoinedStates``, which nothing
        makes dense as long as attention "hqqtensor" reads them."""
        tokens = key_states.shape[2]
        if self._packed[0] is None or tokens > MOST_TOKENS or torch.is_grad_enabled():
            if self.is_initialized:
                self._pack_full_blocks()
            return super().update(key_states, value_states, *args, **kwargs)
        self._write(key_states, value_states)
        return self._show(0, self.keys), self._show(1, self.values)

    def _best_rotation(self, head_dim: int) -> tuple[bool, bool]:
        """Both, where it helps: attention turns queries and sums, not each packed token."""
        rotated = self.settings.nbits <= MOST_ROTATED_BITS and head_dim & (head_dim - 1) == 0
        return rotated, rotated

    def _show(self, which: int, recent: Tensor) -> Tensor:
        packed = self.packed
        assert packed is not None
        axis, rotated = (packed.axis_value, packed.rotated_values) if which else (packed.axis_key, packed.rotated_keys)
        signs = packed.signs if rotated else None
        qdata, scale, zero = packed.tensors[3 * which : 3 * which + 3]
        return JoinedStates(recent, qdata, scale, zero, signs, (packed.nbits, packed.group_size, axis))

    @property
    def packed(self) -> PackedStates | None:  # type: ignore[override]
        """The packed tokens; None before the first block is full."""
        keys, values = self._packed
        if keys is None or values is None:
            return None
        if self._shown is None or self._shown[0] is not keys:
            blocks = [self._blocks_of(which, weight) for which, weight in enumerate((keys, values))]
            rotated = self.rotated if self.rotated and self.signs is not None else (False, False)
            tensors = (*blocks[0].tensors, *blocks[1].tensors)
            states = PackedStates(tensors, keys.nbits, keys.group_size, *self.axes, *rotated, self.signs)
            self._shown = (self._packed[0], states)
        return self._shown[1]

    def _blocks_of(self, which: int, weight: HQQTensor) -> PackedBlocks:
        """The blocks with room whose packed tokens are ``weight``; made anew where a crop, say, has put others
        there."""
        blocks = self._blocks[which]
        if blocks is None or blocks.weight is not weight:
            blocks = PackedBlocks(weight)
            self._packed[which] = blocks.weight
            both = (blocks, self._blocks[1]) if which == 0 else (self._blocks[0], blocks)
            self._blocks = both
        return blocks

    def _joined(self, which: int, new: HQQTensor) -> HQQTensor:
        old = self._packed[which]
        if old is None:
            return new
        blocks = self._blocks_of(which, old)
        blocks.add(new)
        return blocks.weight

    def _pack_full_blocks(self) -> None:
        """Pack what has left the window."""
        held = self.end if self.buffers is not None else self.keys.shape[2] if self.keys.ndim == 4 else 0
        if held >= self.residual_length + self.block:
            self.pack_old()

    def make_room(self, tokens: int) -> tuple[Tensor, Tensor]:
        self._pack_full_blocks()
        return super().make_room(tokens)


KINDS: dict[type, Any] = {
    DynamicLayer: RoomyLayer,
    DynamicSlidingWindowLayer: RoomySlidingLayer,
    HqqCacheLayer: RoomyQuantizedLayer,
}
"""The layers of caches that can be made roomy, and what becomes of them."""
ROOMY = tuple(KINDS.values())


def adopt(layer: Any) -> Any:
    """The layer of a cache as one with room, with its keys and values; None for a kind that is none of ``KINDS``."""
    if type(layer) in ROOMY:
        return layer
    if type(layer) not in KINDS or (layer.is_initialized and layer.keys.ndim != 4):
        return None
    kind = KINDS[type(layer)]
    made = kind.__new__(kind)
    state = dict(layer.__dict__)
    keys, values = state.pop("keys"), state.pop("values")
    made.__dict__.update(state)
    made._loose = (keys, values)
    return made


class CacheOfEach:
    """Caches of several sequences, of any lengths: ``forward`` of a prepared model decodes one new token of each.

    caches: ``DynamicCache`` or ``HqqQuantizedCache`` of one sequence each, which hold at least one token.
    """

    def __init__(self, caches: list[Any]) -> None:
        self.caches = caches


def growing_cache(config: Any, **quantized: Any) -> Any:
    """A ``DynamicCache`` for a model's ``config`` to which tokens are added in place: transformers' own copies all keys
    and values for each new token. For ``generate(..., past_key_values=...)`` of models that are not prepared.

    quantized: settings of ``HqqQuantizedCache``, which it then is: ``growing_cache(config, nbits=4)``. With attention
    "hqqtensor" its packed tokens are read as they are.
    """
    cache = HqqQuantizedCache(config, **quantized) if quantized else DynamicCache(config=config)
    cache.layers[:] = [adopt(layer) or layer for layer in cache.layers]
    return cache


def on_cpu(layers: list[Any], dtype: torch.dtype) -> bool:
    """Whether all layers hold keys of ``dtype`` on the CPU."""
    return all(layer.is_initialized and layer.dtype is dtype and layer.device.type == "cpu" for layer in layers)
