"""Codebooks learned for each weight, or for each of its rows: value = entries[code] * scale.

As in "any4: Learned 4-bit Numeric Representation for LLMs" (Elhoushi and Johnson, 2025); ``solvers.codebook`` learns
the entries.
"""

import torch
from torch import Tensor

from hqqtensor.formats.base import register_format
from hqqtensor.formats.levels import Levels


class LearnedFormat:
    """1 to 4 bits. The entries, ascending, take the zero point's place: ``[..., N or 1, 2**nbits]``."""

    name = "codebook"
    widths: tuple[int, ...] = (1, 2, 3, 4)
    has_zero_point = False
    learned = True

    def encode(self, w: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        """``w`` ``[N, K]``; entries ``[1, 2**nbits]`` or ``[N, 2**nbits]``."""
        assert zero_point is not None
        entries = zero_point[0] if zero_point.shape[0] == 1 else zero_point
        return Levels.between(entries).nearest(w * inverse_scale).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        """``codes`` ``[..., N, K]``; entries ``[2**nbits]`` for all of them, or ``[..., N or 1, 2**nbits]``."""
        assert zero_point is not None
        entries = zero_point.to(torch.float32)
        if entries.numel() == entries.shape[-1]:
            return torch.index_select(entries.flatten(), 0, codes.flatten().to(torch.int32)).view(codes.shape) * scale
        return torch.gather(entries.expand(*codes.shape[:-1], -1), -1, codes.long()) * scale

    def levels(self, nbits: int) -> None:
        return None

    def ends(self, nbits: int) -> tuple[int, int]:
        return 0, 2**nbits - 1


CODEBOOK = LearnedFormat()
register_format(CODEBOOK)
