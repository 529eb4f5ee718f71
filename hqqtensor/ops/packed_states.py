"""Old keys and values of a cache as packed blocks of tokens, which attention reads where they lie."""

from typing import NamedTuple

import torch
from torch import Tensor

OPS = torch.ops.hqqtensor


class PackedStates(NamedTuple):
    """Keys and values ``[B, kv_heads, blocks * block, D]`` of one layer, packed.

    tensors: qdata, scale and zero point of the keys, then of the values: blocks ``[blocks, B, kv_heads, block, D]`` of
    integers, block 0 of all heads of all sequences, then block 1 of them. nbits, group_size, axis_key, axis_value: as
    of ``PackedWeight``. rotated_keys, rotated_values: whether they were multiplied by ``rotation_matrix(signs)`` before
    they were packed. signs: float32 ``[D]`` of 1 and -1; None where nothing is rotated. A block has up to 256 tokens.
    """

    tensors: tuple[Tensor, ...]
    nbits: int
    group_size: int
    axis_key: int
    axis_value: int
    rotated_keys: bool = False
    rotated_values: bool = False
    signs: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are packed."""
        return self.tensors[0].shape[0] * self.tensors[0].shape[3]

    @property
    def settings(self) -> list[int]:
        """As the operators take them."""
        return list(map(int, self[1:7]))

    def dense(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as ``[B, kv_heads, tokens, D]``, no longer rotated."""
        settings, signs = (self.nbits, self.group_size), self.signs
        keys = dense_states(
            self.tensors[:3], (*settings, self.axis_key), signs if self.rotated_keys else None, head_dim
        )
        values = dense_states(
            self.tensors[3:], (*settings, self.axis_value), signs if self.rotated_values else None, head_dim
        )
        return keys.to(dtype), values.to(dtype)


def dense_states(
    parts: tuple[Tensor, ...], settings: tuple[int, int, int], signs: Tensor | None, head_dim: int
) -> Tensor:
    """Packed blocks (qdata, scale, zero point) as float32 ``[B, kv_heads, tokens, D]``. settings: (nbits, group_size,
    axis). signs: those that they were rotated with, or None."""
    nbits, group_size, axis = settings
    states = OPS.dequantize(*parts, [], nbits, "int", group_size, axis, head_dim, torch.float32)
    states = states.movedim(0, 2).flatten(2, 3)
    return states if signs is None else states @ rotation_matrix(signs)


def rotation_matrix(signs: Tensor) -> Tensor:
    """The orthogonal R, float32 ``[D, D]``, for ``signs`` ``[D]``, D a power of two: x becomes R x, which is
    Sylvester's Hadamard matrix, divided by the root of D, times ``signs * x``."""
    rows = torch.ones(1, 1, device=signs.device)
    while rows.shape[0] < signs.shape[0]:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows * signs * signs.shape[0] ** -0.5
