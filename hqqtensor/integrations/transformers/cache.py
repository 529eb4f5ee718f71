"""A quantized cache of keys and values: packed blocks of old tokens, exact recent ones.

Keys are grouped per channel over tokens and values per token over channels by default, as in KIVI (Liu et al., 2024,
arXiv 2402.02750); keys that are rotated, in which no channel stands out, per token too. A block is quantized once, when
it leaves the window of recent tokens, and never again.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hqqtensor import ops
from hqqtensor.config import HqqConfig
from hqqtensor.kernels import cpu
from hqqtensor.ops.packed_states import rotation_matrix
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import signs

ROTATIONS: dict[str | None, tuple[bool, bool] | None] = {
    "auto": None,
    None: (False, False),
    "keys": (True, False),
    "both": (True, True),
}
"""Values of ``HqqQuantizedCache(rotation=)``: whether keys, and whether values, are rotated; None: a layer decides."""
MOST_ROTATED_BITS = 4
"""The widest numbers that "auto" rotates: from 8 bits on a rotation brings nothing that can be measured."""


class HqqCacheLayer(DynamicLayer):
    """Keys and values ``[B, H, T, D]`` of one layer; all but the last tokens packed in blocks of ``block`` tokens.

    rotated: whether keys, and whether values, are rotated by ``rotation_matrix(signs)`` before they are packed; None
    decides by ``_best_rotation`` when the first block is packed. axis_key: None for 1 where keys are rotated, else 0.
    """

    keys: Tensor
    values: Tensor
    signs: Tensor | None

    def __init__(
        self, settings: HqqConfig, axis_key: int | None, axis_value: int, block: int, residual_length: int,
        pool: Any = None, rotated: tuple[bool, bool] | None = (False, False),
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self._axis_key, self._axis_value = settings, axis_key, axis_value
        self.block, self.residual_length, self._pool = block, residual_length, pool
        self.rotated, self.signs = rotated, None
        self._packed: list[HQQTensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new states; returns all of them, those in the window and the new ones exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        recent = [torch.cat(pair, dim=-2) for pair in ((self.keys, key_states), (self.values, value_states))]
        out = self._all(0, recent[0]), self._all(1, recent[1])
        self._keep(recent)
        return out

    def pack_old(self) -> None:
        """Pack the tokens that have left the window of recent ones, if they fill a block."""
        self._keep([self.keys, self.values])

    def _keep(self, recent: list[Tensor]) -> None:
        """Hold these keys and values behind the packed ones; those that have left the window are packed."""
        count = (recent[0].shape[-2] - self.residual_length) // self.block * self.block
        if count > 0:
            new = [self._pack(which, states[..., :count, :]) for which, states in enumerate(recent)]
            self._packed = [self._joined(which, pack) for which, pack in enumerate(new)]
            # Copies: views would hold the memory of the tokens that are packed now.
            recent = [states[..., count:, :].clone() for states in recent]
        self.keys, self.values = recent

    def _joined(self, which: int, new: HQQTensor) -> HQQTensor:
        """The packed blocks with new ones behind them."""
        old = self._packed[which]
        return new if old is None else torch.cat([old, new], dim=2)  # type: ignore[return-value]

    def _rotation(self, which: int, head_dim: int) -> Tensor | None:
        """The matrix that keys (0) or values (1) are rotated with; None where they are not."""
        if self.rotated is None:
            self.rotated = self._best_rotation(head_dim)
        if not self.rotated[which]:
            return None
        if head_dim & (head_dim - 1):
            raise ValueError(f"rotation of the cache needs heads of a power of two, got {head_dim} channels")
        if self.signs is None:
            self.signs = signs(head_dim, 0)
        return rotation_matrix(self.signs.to(self.device))

    @property
    def axes(self) -> tuple[int, int]:
        """Of the groups of keys and of values, when a block has been packed."""
        assert self.rotated is not None
        return int(self.rotated[0]) if self._axis_key is None else self._axis_key, self._axis_value

    def _best_rotation(self, head_dim: int) -> tuple[bool, bool]:
        """What "auto" rotates: nothing here. Each new token would turn all packed ones back, which takes longer than
        the rest of its attention."""
        return False, False

    def _pack(self, which: int, states: Tensor) -> HQQTensor:
        """``[B, H, C * block, D]`` packed as ``[B, H, C, block, D]``."""
        rotation = self._rotation(which, states.shape[-1])
        if rotation is not None:
            states = (states.to(torch.float32) @ rotation.T).to(states.dtype)
        blocks = states.unflatten(2, (-1, self.block))
        try:
            if self.axes[which]:
                return HQQTensor.from_hp(blocks, self.settings)
            # All G blocks in one matrix: its row n is in group n % G, so the rows of the blocks alternate.
            rows = blocks.movedim(3, 0).reshape(-1, blocks.shape[-1])
            packed = HQQTensor.from_hp(rows, replace(self.settings, axis=0))
        except ValueError as error:
            raise ValueError(f"{list(states.shape)} states of the cache: {error}") from None
        shape = (self.block, *blocks.shape[:3], -1)
        qdata = packed.qdata.view(shape).movedim(0, 3).contiguous()
        scale, zero = (t.view(*blocks.shape[:3], 1, -1) for t in (packed.scale, packed.zero_point))  # type: ignore[union-attr]
        return packed.with_data(qdata=qdata, scale=scale, zero_point=zero, shape=blocks.shape)

    def _all(self, which: int, recent: Tensor) -> Tensor:
        """Packed tokens, dequantized into the tensor that is returned, followed by the ``recent`` ones."""
        packed = self._packed[which]
        if packed is None:
            return recent
        B, H, count, D = recent.shape
        packed_length = self._packed_length()
        size = (B, H, packed_length + count, D)
        on_cpu = self._pool is not None and recent.device.type == "cpu"
        out = self._pool.empty(size, recent) if on_cpu else recent.new_empty(size)
        ops.dequantize_into(out[:, :, :packed_length].view(B, H, -1, self.block, D), packed.operand())
        rotation = self._rotation(which, D)
        if rotation is not None:
            out[:, :, :packed_length] = out[:, :, :packed_length].to(torch.float32) @ rotation
        out[:, :, packed_length:] = recent
        return out

    def _packed_length(self) -> int:
        # The shape of the codes: asking an HQQTensor for its shape goes through torch's function dispatch.
        return 0 if self._packed[0] is None else self._packed[0].qdata.shape[2] * self.block

    def get_seq_length(self) -> int:
        """Number of tokens, packed and recent."""
        recent = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return self._packed_length() + recent

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, packed and recent."""
        return sum(t.nbytes for t in (*self._packed, self.keys, self.values) if t is not None)

    def reset(self) -> None:
        """Forget everything."""
        self._packed = [None, None]
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; what is left of a block that is cut comes back dequantized."""
        length = self.get_seq_length() + tokens_to_remove
        if self._packed_length() <= length or tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)
            return
        blocks, left = divmod(max(length, 0), self.block)
        recent: list[Tensor] = []
        for which, packed in enumerate(self._packed):
            assert packed is not None
            last = packed[:, :, blocks : blocks + 1].dequantize().flatten(2, 3)
            rotation = self._rotation(which, last.shape[-1])
            if rotation is not None:
                last = (last.to(torch.float32) @ rotation).to(last.dtype)
            recent.append(last[..., :left, :].clone())
            self._packed[which] = packed[:, :, :blocks] if blocks else None  # type: ignore[assignment]
        self.keys, self.values = recent

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch in another order: packed codes are moved, not unpacked."""
        if self.get_seq_length():
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each element of the batch ``repeats`` times."""
        if self.get_seq_length():
            self._select(torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Remove all elements of the batch but ``indices``, and put them in that order."""
        if self.get_seq_length():
            self._select(indices)

    def _select(self, indices: Tensor) -> None:
        indices = indices.to(self.device)
        self.keys, self.values = self.keys[indices], self.values[indices]
        self._packed = [None if packed is None else packed[indices] for packed in self._packed]  # type: ignore[misc]


class HqqQuantizedCache(Cache):
    """``past_key_values`` for ``generate`` and ``forward``: full-attention layers quantized, others as they are.

    nbits: bits a number, 1 to 8. axis_key, axis_value: 0 groups over ``q_group_size`` tokens of a channel, 1 over
    ``q_group_size`` channels of a token; ``axis_key=None`` is 1 where keys are rotated, else 0. q_group_size: also the
    tokens in a block. residual_length: the most recent tokens, which stay exact, together with those that do not fill a
    block yet. solver: as in ``HqqConfig``. rotation: "keys" or "both": keys, or keys and values, are rotated by a
    random Hadamard matrix before they are packed, which mixes the channels of a head; None for neither. "auto" is
    "both" at 4 bits and fewer where packed tokens are read in place (a prepared model, ``growing_cache``) and heads
    have a power of two channels, else None.

    Raises ValueError for settings that ``HqqConfig`` refuses, and at the first block for groups over the head's
    channels; with "keys" or "both", for heads whose channels are no power of two.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        nbits: int = 4,
        axis_key: int | None = None,
        axis_value: int = 1,
        q_group_size: int = 64,
        residual_length: int = 128,
        solver: str = "hqq_joint",
        rotation: str | None = "auto",
    ) -> None:
        settings = HqqConfig(nbits, q_group_size, solver=solver, scale_dtype=torch.float16)
        if axis_key not in (0, 1, None):
            raise ValueError(f"axis_key must be 0 (over tokens), 1 (over channels) or None, got {axis_key!r}")
        if axis_value not in (0, 1):
            raise ValueError(f"axis_value must be 0 (over tokens) or 1 (over channels), got {axis_value!r}")
        if not isinstance(residual_length, int) or residual_length < 0:
            raise ValueError(f"residual_length must be 0 or more tokens, got {residual_length!r}")
        if rotation not in ROTATIONS:
            raise ValueError(f"rotation must be one of {list(ROTATIONS)}, got {rotation!r}")
        # One pool for all layers: as a rule, what one layer returned is freed before the next one asks for memory.
        options = (settings, axis_key, axis_value, q_group_size, residual_length, cpu.pool(), ROTATIONS[rotation])
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[HqqCacheLayer(*options) if type(x) is DynamicLayer else x for x in layers])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return sum(
            layer.nbytes if isinstance(layer, HqqCacheLayer) else layer.keys.nbytes + layer.values.nbytes
            for layer in self.layers
            if layer.is_initialized
        )
