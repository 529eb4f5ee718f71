"""PTX that turns four packed bytes into 16-bit floats, two weights an instruction.

Triton handles bytes one at a time; these texts (for ``tl.inline_asm_elementwise``, ``pack=4``) work on whole registers.
A code in the low mantissa bits of a float with the right exponent *is* a number: 0x6400 | code is 1024 + code in
float16, 0x4300 | code is 128 + code in bfloat16. A code that begins at bit b needs an exponent lower by b, so it is
used where it lies. Subtracting the offset is exact. The plain form of the same decoding is in ``decode.py``; the tests
run both, this one through a small model of the instructions.
"""

from hqqtensor.packing import PLANES

FORMATS = {"fp16": (10, 15), "bf16": (7, 127)}
"""Mantissa bits and exponent bias."""


def decoder(nbits: int, dtype: str) -> tuple[str, str]:
    """The text and the constraints for integer codes of ``nbits`` as "fp16" or "bf16".

    Inputs: a register of four bytes of each plane, then for each plane but the first a register of four equal shift
    counts. Outputs: for each position in a byte of the widest plane, the codes of the four bytes as two registers.
    """
    text = _Text(nbits, dtype)
    text.build()
    return str(text), text.constraints


class _Text:
    def __init__(self, nbits: int, dtype: str) -> None:
        self.nbits, self.dtype = nbits, dtype
        self.planes = PLANES[nbits]
        self.positions = 8 // self.planes[0]
        self.mantissa, self.bias = FORMATS[dtype]
        self.lines: list[str] = []
        self.names = 0
        inputs = 2 * len(self.planes) - 1
        self.constraints = ",".join(["=&r"] * (2 * self.positions) + ["r"] * inputs)

    def __str__(self) -> str:
        declared = [f".reg .b32 t<{self.names}>;"] if self.names else []
        return "{\n" + "\n".join(declared + self.lines) + "\n}"

    def op(self, name: str, *sources: object, to: str | None = None) -> str:
        if to is None:
            to = f"t{self.names}"
            self.names += 1
        self.lines.append(f"{name} {', '.join(map(str, (to, *sources)))};")
        return to

    def build(self) -> None:
        first = 2 * self.positions
        words = [f"${first + i}" for i in range(len(self.planes))]
        for i in range(1, len(self.planes)):
            # Of the four equal counts in the register, the wrapping shift takes the lowest five bits.
            count = f"${first + len(self.planes) + i - 1}"
            words[i] = self.op("shf.r.wrap.b32", words[i], 0, count)
        if self.nbits == 8 and self.dtype == "bf16":
            self.wide_bytes(words[0])
        elif self.nbits == 8:
            self.whole_bytes(words[0], 0)
        elif len(self.planes) == 1:
            self.fields(words[0], [(i * self.nbits, i) for i in range(self.positions)])
        elif self.nbits == 3:
            # Two codes a byte, each with its high bit beside it: positions 0 and 2, then 1 and 3.
            even = self.select(words[0], self.op("shl.b32", words[1], 2), 0x33)
            odd = self.select(self.op("shr.b32", words[0], 2), words[1], 0x33)
            self.fields(even, [(0, 0), (4, 2)])
            self.fields(odd, [(0, 1), (4, 3)])
        else:
            high = words[1]
            if self.nbits == 7:
                high = self.select(high, self.op("shl.b32", words[2], 2), 0x33)
            mask = _bytes(((1 << (self.nbits - 4)) - 1) << 4)
            up = self.op("and.b32", self.op("shl.b32", high, 4), mask)
            self.whole_bytes(self.select(words[0], up, 0x0F), 0)
            up = self.op("and.b32", high, mask)
            self.whole_bytes(self.select(self.op("shr.b32", words[0], 4), up, 0x0F), 1)

    def select(self, yes: str, no: str, mask: int) -> str:
        """yes where ``mask`` (of a byte) has ones, no elsewhere."""
        return self.op("lop3.b32", yes, no, _bytes(mask), 0xE4)

    def whole_bytes(self, word: str, position: int) -> None:
        """Bytes as numbers: the exponent comes in with the permutation."""
        magic = self.magic(0)
        for half, order in enumerate((0x4140, 0x4342)):
            out = f"${2 * position + half}"
            self.op("prmt.b32", word, _hex(magic >> 8), _hex(order), to=out)
            self.subtract(out, magic)

    def fields(self, word: str, where: list[tuple[int, int]]) -> None:
        """Codes at the given bits of each byte to the given positions."""
        for half, order in enumerate((0x4140, 0x4342)):
            lanes = self.op("prmt.b32", word, 0, _hex(order))
            for bit, position in where:
                shift = max(0, bit + self.nbits - self.mantissa)
                source = self.op("shr.b32", lanes, shift) if shift else lanes
                mask, magic = ((1 << self.nbits) - 1) << (bit - shift), self.magic(bit - shift)
                out = f"${2 * position + half}"
                self.op("lop3.b32", source, _halves(mask), _halves(magic), 0xEA, to=out)
                self.subtract(out, magic)

    def wide_bytes(self, word: str) -> None:
        """bfloat16 has no room for 8 bits below the leading one: by float32, 0x4B000000 | code is 2**23 + code."""
        for half in (0, 1):
            pair = []
            for i in (0, 1):
                wide = self.op("prmt.b32", word, _hex(0x4B), _hex(0x4550 | (2 * half + i)))
                pair.append(self.op("sub.f32", wide, "0f4B000000"))
            # Codes up to 255 are bfloat16 numbers, so the upper halves are the numbers.
            self.op("prmt.b32", pair[0], pair[1], _hex(0x7632), to=f"${half}")

    def magic(self, bit: int) -> int:
        """The float whose unit in the last place is 2**-bit, for codes that begin at ``bit``."""
        return (self.bias + self.mantissa - bit) << self.mantissa

    def constant(self, value: str) -> str:
        return self.op("mov.b32", value)

    def subtract(self, register: str, magic: int) -> None:
        if self.dtype == "fp16":
            self.op("sub.f16x2", register, self.constant(_halves(magic)), to=register)
        else:  # sub.bf16x2 needs sm_90; this is as exact
            one, minus = self.constant(_halves(0x3F80)), self.constant(_halves(magic | 0x8000))
            self.op("fma.rn.bf16x2", register, one, minus, to=register)


def _hex(value: int) -> str:
    return f"0x{value:X}"


def _bytes(value: int) -> str:
    return _hex(value * 0x01010101)


def _halves(value: int) -> str:
    return _hex(value * 0x00010001)
