"""Four packed bytes to 16-bit floats in whole registers, two weights an instruction, for ``tl.inline_asm_elementwise``.

Triton handles bytes one at a time; the texts made here (``pack=4``) work on whole registers. A code in the low mantissa
bits of a float with the right exponent *is* a number: 0x6400 | code is 1024 + code in float16, 0x4300 | code is 128 +
code in bfloat16. A code that begins at bit b needs an exponent lower by b, so it is used where it lies. What is left is
an offset that is the same for all weights of a position: either one packed subtraction takes it off, exactly, or the
kernel takes ``offset * sum(x)`` off the product's float32 sums, which costs the sums up to 10 of their 24 bits and
saves an instruction for two weights. ``ptx.py`` and ``gcn.py`` write the steps down for NVIDIA and AMD. The plain form
of the same decoding is in ``decode.py``; tests run both, these texts through a small model of their instructions.
"""

from dataclasses import dataclass

from hqqtensor.packing import PLANES

FORMATS = {"fp16": (10, 15), "bf16": (7, 127)}
"""Mantissa bits and exponent bias."""


@dataclass(frozen=True)
class Decoder:
    """What the kernel needs to decode in registers; an empty text stands for the plain form.

    constants: 32-bit operands that follow the planes and their shifts. half: "fp16" or "bf16". offsets: by how much the
    numbers of each position are too large, () where by nothing. shifts: for the planes whose bits lie
    in the same byte for several columns, h bits too high, base and factor of h in the shift counts that the text wants.
    """

    text: str = ""
    constraints: str = ""
    constants: tuple[int, ...] = ()
    half: str = "fp16"
    offsets: tuple[float, ...] = ()
    shifts: tuple[tuple[int, int], ...] = ((0, 1), (0, 1))


@dataclass(frozen=True)
class Step:
    """One instruction: its name, target, and sources, which are registers (str) and constants (int)."""

    name: str
    target: str
    sources: tuple[str | int, ...]


class Steps:
    """The steps to numbers of "fp16" or "bf16", as ``ptx.py`` and ``gcn.py`` build and write them.

    Registers: "o<2 j + i>" holds the numbers of position j of the bytes 2 i and 2 i + 1, "t..." are temporary. Names of
    steps: shr, shl, rotr, rotl (by a count), and, select (yes, no, mask), bytes or pick (low, high, order: which byte,
    0 to 3 of low, 4 to 7 of high, goes where), field (x, mask, magic: x & mask | magic), less (x, magic: a pair of
    floats), float (word, i: byte i as float32).
    """

    def __init__(self, nbits: int, half: str, exact: bool) -> None:
        self.nbits, self.half, self.exact = nbits, half, exact
        self.planes = PLANES[nbits]
        positions = 8 // max(2, self.planes[0])
        self.mantissa, self.bias = FORMATS[half]
        self.steps: list[Step] = []
        self.names = 0
        self.offsets = [0.0] * positions
        self.shifts: tuple[tuple[int, int], ...] = ((0, 1), (0, 1))
        # The planes narrower than what a column's position takes lie in the same byte for several columns.
        self.shifted = [i for i, plane in enumerate(self.planes) if plane < max(2, self.planes[0])]
        self.outputs = [f"o{i}" for i in range(2 * positions)]

    def op(self, name: str, *sources: str | int, to: str | None = None) -> str:
        if to is None:
            to = f"t{self.names}"
            self.names += 1
        self.steps.append(Step(name, to, sources))
        return to

    def field(self, lanes: str, bit: int, position: int, half: int) -> None:
        """The codes that begin at a bit of two 16-bit lanes as numbers."""
        shift = max(0, bit + self.nbits - self.mantissa)
        source = self.op("shr", lanes, shift) if shift else lanes
        mask, magic = ((1 << self.nbits) - 1) << (bit - shift), halves(self.magic(bit - shift))
        self.number("field", position, half, bit - shift, source, halves(mask), magic)

    def number(self, name: str, position: int, half: int, bit: int, *sources: str | int) -> None:
        """A step that gives numbers with an offset, and what becomes of the offset."""
        out = self.op(name, *sources, to=f"o{2 * position + half}")
        if self.exact:
            self.op("less", out, halves(self.magic(bit)), to=out)
        else:
            self.offsets[position] = 2.0 ** (self.mantissa - bit)

    def magic(self, bit: int) -> int:
        """The float whose unit in the last place is 2**-bit, for codes that begin at ``bit``."""
        return (self.bias + self.mantissa - bit) << self.mantissa

    def decoder(self, text: str, constraints: list[str], constants: tuple[int, ...] = ()) -> Decoder:
        offsets = tuple(self.offsets) if any(self.offsets) else ()
        return Decoder(text, ",".join(constraints), constants, self.half, offsets, self.shifts)


def fourfold(value: int) -> int:
    """A register of four such bytes."""
    return value * 0x01010101


def halves(value: int) -> int:
    """A register of two such halves."""
    return value * 0x00010001
