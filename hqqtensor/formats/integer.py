"""Unsigned integer codes of 1 to 8 bits: value = (code - zero_point) * scale."""

import torch
from torch import Tensor

from hqqtensor.formats.base import register_format


class IntegerFormat:
    """The codes 0 .. 2**nbits - 1, evenly spaced."""

    name = "int"
    widths = tuple(range(1, 9))
    has_zero_point = True
    learned = False

    def encode(self, w: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        assert zero_point is not None
        codes = (w * inverse_scale).add_(zero_point).round_()
        return codes.clamp_(0, 2**nbits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor:
        assert zero_point is not None
        return (codes.to(torch.float32) - zero_point) * scale

    def levels(self, nbits: int) -> None:
        return None

    def ends(self, nbits: int) -> tuple[int, int]:
        return 0, 2**nbits - 1


INTEGER = IntegerFormat()
register_format(INTEGER)
