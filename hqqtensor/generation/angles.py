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
        kinds = self._rotary.rope_type
        self.changing = any(kind in CHANGING for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))
        self._tables: list[tuple[Tensor, Tensor]] = []

    def tables(self, places: int) -> list[tuple[Tensor, Tensor]]:
        """For all places below ``places``."""
        if not self._tables or self._tables[0][0].shape[0] < places:
            count = max(FIRST, 2 * places)
            self._tables = self.at(torch.arange(count).unsqueeze(0))
        return self._tables

    def at(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of positions ``[B, T]``, one row for each."""
        x = torch.empty(1, dtype=self._dtype)
        found = [self._rotary(x, positions) if t is None else self._rotary(x, positions, t) for t in self._types]
        return [(cos.flatten(0, 1).float(), sin.flatten(0, 1).float()) for cos, sin in found]


def types_of(config: Any, family: Family) -> list[str | None]:
    """The types of layers that have angles of their own, in the order of ``rope``."""
    return sorted(set(config.layer_types)) if family.rope_by_type else [None]
