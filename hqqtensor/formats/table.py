"""Formats whose codes stand for fixed values: value = table[code] * scale."""

import torch
from torch import Tensor

from hqqtensor.formats.levels import Levels


class TableFormat:
    """One width, one table.

    table: float32 ``[2**nbits]``, the value of each code at scale 1; NaN for a code that stands for nothing.
    levels: the values that encoding chooses from, ascending. codes: uint8, the code of each of them.
    rounding: (bits of the mantissa, smallest normal number) of floating-point codes, which kernels find by rounding
    instead of a search; None for other tables.
    """

    has_zero_point = False
    learned = False

    def __init__(
        self, name: str, table: Tensor, levels: Levels, codes: Tensor, rounding: tuple[int, float] | None = None
    ) -> None:
        self.name, self.table, self.codes, self.rounding = name, table, codes, rounding
        self._levels = levels
        self.widths: tuple[int, ...] = (len(table).bit_length() - 1,)

    def encode(self, w: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        index = self._levels.nearest(w * inverse_scale)
        return torch.index_select(self.codes.to(w.device), 0, index.flatten()).view(w.shape)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        table = self.table.to(codes.device)
        return torch.index_select(table, 0, codes.flatten().to(torch.int32)).view(codes.shape) * scale

    def levels(self, nbits: int) -> Levels:
        return self._levels

    def ends(self, nbits: int) -> tuple[int, int]:
        return int(self.codes[0]), int(self.codes[-1])
