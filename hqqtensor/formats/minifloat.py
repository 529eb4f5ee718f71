"""Floating-point codes of 4, 6 and 8 bits: sign, exponent, mantissa, the sign in the highest bit.

The element formats of the OCP Microscaling Formats (MX) Specification v1.0 (2023) and, for E4M3, of the OCP 8-bit
Floating Point Specification: E2M1 (bias 1, largest 6), E3M2 (bias 3, largest 28), E4M3 (bias 7, largest 448; exponent
and mantissa all ones are NaN, no infinities). Exponent 0 holds zero and the subnormal numbers. Scales are ours: one
of ``scale_dtype`` for each group, not a power of two.
"""

import torch

from hqqtensor.formats.base import register_format
from hqqtensor.formats.levels import Levels
from hqqtensor.formats.table import TableFormat


def magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """Values of the codes with sign 0, in order of the codes, which is their order too."""
    out = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        out.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return out


def minifloat(name: str, exponent_bits: int, mantissa_bits: int, bias: int, nan: bool) -> TableFormat:
    """The format of a sign, ``exponent_bits`` and ``mantissa_bits``; ``nan``: the last magnitude is NaN.

    Encoding takes the nearest value, of two equally near the one with the even code, and the largest for numbers beyond
    it. Zero is always code 0, never the code of zero with a sign.
    """
    positive = torch.tensor(magnitudes(exponent_bits, mantissa_bits, bias))
    sign = len(positive)
    if nan:
        positive[-1] = torch.nan
    usable = positive[:-1] if nan else positive
    values = torch.cat([-usable[1:].flip(0), usable])
    low = torch.arange(len(usable))
    codes = torch.cat([low[1:].flip(0) + sign, low])
    middle = (values[1:] + values[:-1]) / 2  # exact: a few bits more than the codes have
    upper_is_even = codes[1:] % 2 == 0
    thresholds = torch.where(upper_is_even, torch.nextafter(middle, torch.tensor(-torch.inf)), middle)
    table, levels = torch.cat([positive, -positive]), Levels(values, thresholds)
    return TableFormat(name, table, levels, codes.to(torch.uint8), (mantissa_bits, 2.0 ** (1 - bias)))


FP4 = minifloat("fp4", 2, 1, 1, nan=False)
FP6 = minifloat("fp6", 3, 2, 3, nan=False)
FP8 = minifloat("fp8", 4, 3, 7, nan=True)
for _fmt in (FP4, FP6, FP8):
    register_format(_fmt)
