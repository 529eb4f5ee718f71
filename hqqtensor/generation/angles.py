"""Cosines and sines of rotary embeddings, by a model's own module: tables over places, made once."""

from typing import Any

import torch
from torch import Tensor

from hqqtensor.generation.families import Family

FIRST = 1024  # places of the first table
CHANGING = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the length of the sequence."""


class Angles:
    """Tables ``[places, width]``, float32, one for each type of layer that has angles of its own."""

    def __init__(self, base: Any, family: Family) -> None:
        self._rotary, self._dtype = base.rotary_emb, base.norm.weight.dtype
        self._types = types_of(base.config, family)
        self._changing = change_with_length(base)
        self._tables: list[tuple[Tensor, Tensor]] = []

    def of(self, positions: Tensor | None, past: int, tokens: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Tables, and the places in them of new tokens at ``positions`` ``[B or 1, T]``, by default behind ``past``."""
        if self._changing:  # by the longest sequence, as transformers has them for a batch
            given = torch.arange(past, past + tokens).unsqueeze(0) if positions is None else positions
            return self._at(given), torch.arange(given.numel()).view_as(given)
        if not self._tables or self._tables[0][0].shape[0] < past + tokens:
            self._tables = self._at(torch.arange(max(FIRST, 2 * (past + tokens))).unsqueeze(0))
        return self._tables, positions

    def _at(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of positions ``[B, T]``, one row for each."""
        x = torch.empty(1, dtype=self._dtype)
        found = [self._rotary(x, positions) if t is None else self._rotary(x, positions, t) for t in self._types]
        return [(cos.flatten(0, 1).float(), sin.flatten(0, 1).float()) for cos, sin in found]


def change_with_length(base: Any) -> bool:
    """Whether the angles of a base model's tokens depend on the length of the sequence."""
    kinds = base.rotary_emb.rope_type
    return any(kind in CHANGING for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def types_of(config: Any, family: Family) -> list[str | None]:
    """The types of layers that have angles of their own, in the order of ``rope``."""
    return sorted(set(config.layer_types)) if family.rope_by_type else [None]
