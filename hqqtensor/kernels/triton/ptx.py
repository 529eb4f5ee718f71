"""Decoding on NVIDIA: four bytes of each plane in a register, PTX."""

from hqqtensor.kernels.triton.words import Decoder, Step, Steps, fourfold


def decoder(nbits: int, half: str, exact: bool) -> Decoder:
    """Decoder of integer codes of ``nbits`` to "fp16" or "bf16".

    Inputs: a register of four bytes of each plane, then, for each plane whose bits lie in the same byte for several
    columns, four equal shift counts.
    """
    plan = _Words(nbits, half, exact)
    inputs = [f"p{i}" for i in range(len(plan.planes))] + [f"s{i}" for i in plan.shifted]
    registers = {name: f"${i}" for i, name in enumerate(plan.outputs + inputs)}
    lines = [line for step in plan.steps for line in _lines(step, half)]
    names = sorted({word.strip(",;") for line in lines for word in line.split() if word[0] == "t"})
    declared = [f".reg .b32 {', '.join(names)};"] if names else []
    text = "\n".join(["{", *declared, *(_named(line, registers) for line in lines), "}"])
    return plan.decoder(text, ["=&r"] * len(plan.outputs) + ["r"] * len(inputs))


class _Words(Steps):
    """Planes "p0" to "p2", shift counts "s0" to "s2"."""

    def __init__(self, nbits: int, half: str, exact: bool) -> None:
        super().__init__(nbits, half, exact)
        words = [f"p{i}" for i in range(len(self.planes))]
        for i in self.shifted:
            words[i] = self.op("rotl" if nbits == 3 else "rotr", words[i], f"s{i}")
        if nbits == 8 and half == "bf16":
            self._wide_bytes(words[0])
        elif nbits == 8:
            self._whole_bytes(words[0], 0)
        elif nbits == 3:
            self.shifts = ((2, -1),)
            # The high bits, two higher than the low ones, join those of positions 0 and 2, then of 1 and 3, the last
            # one's in the next byte, until all of them turn. Positions that share a group then have one offset.
            even = self.op("select", words[0], words[1], fourfold(0x33))
            odd = self.op("select", words[0], words[1], fourfold(0xCC))
            self._fields(even, [(0, 0), (4, 2)])
            self._fields(self.op("rotr", odd, 2), [(0, 1), (4, 3)])
        elif len(self.planes) == 1:
            step = max(2, nbits)
            self._fields(words[0], [(i * step, i) for i in range(8 // step)])
        else:
            high = words[1]
            if nbits == 7:
                high = self.op("select", high, self.op("shl", words[2], 2), fourfold(0x33))
            mask = fourfold(((1 << (nbits - 4)) - 1) << 4)
            up = self.op("and", self.op("shl", high, 4), mask)
            self._whole_bytes(self.op("select", words[0], up, fourfold(0x0F)), 0)
            up = self.op("and", high, mask)
            self._whole_bytes(self.op("select", self.op("shr", words[0], 4), up, fourfold(0x0F)), 1)

    def _whole_bytes(self, word: str, position: int) -> None:
        """Bytes as numbers: the exponent comes in with the permutation."""
        for half, order in enumerate((0x4140, 0x4342)):
            self.number("bytes", position, half, 0, word, self.magic(0) >> 8, order)

    def _fields(self, word: str, where: list[tuple[int, int]]) -> None:
        """Codes at the given bits of each byte to the given positions."""
        for half, order in enumerate((0x4140, 0x4342)):
            lanes = self.op("bytes", word, 0, order)
            for bit, position in where:
                self.field(lanes, bit, position, half)

    def _wide_bytes(self, word: str) -> None:
        """bfloat16 has no room for 8 bits below the leading one, so by float32. Codes up to 255 are bfloat16 numbers:
        the upper halves are the numbers."""
        for half in (0, 1):
            pair = [self.op("float", word, 2 * half + i) for i in (0, 1)]
            self.op("bytes", *pair, 0x7632, to=f"o{half}")


def _lines(step: Step, half: str) -> list[str]:
    to, sources = step.target, [hex(s) if isinstance(s, int) else s for s in step.sources]
    if step.name in (
        "rotr",
        "rotl",
    ):  # of four equal counts in a register, the wrapping shift takes the lowest five bits
        return [f"shf.{step.name[3]}.wrap.b32 {to}, {sources[0]}, {sources[0]}, {sources[1]};"]
    if step.name == "float":  # 0x4B000000 | code is 2**23 + code
        place = int(step.sources[1])
        return [f"prmt.b32 {to}, {sources[0]}, 0x4b, {0x4550 | place:#x};", f"sub.f32 {to}, {to}, 0f4B000000;"]
    if step.name == "less" and half == "fp16":
        return [f"mov.b32 t_{to}, {sources[1]};", f"sub.f16x2 {to}, {sources[0]}, t_{to};"]
    if step.name == "less":  # sub.bf16x2 needs sm_90; this is as exact
        minus = int(step.sources[1]) | 0x80008000
        return [
            "mov.b32 t_one, 0x3f803f80;",
            f"mov.b32 t_{to}, {minus:#x};",
            f"fma.rn.bf16x2 {to}, {sources[0]}, t_one, t_{to};",
        ]
    if step.name in ("select", "field"):
        return [f"lop3.b32 {to}, {', '.join(sources)}, {'0xe4' if step.name == 'select' else '0xea'};"]
    name = {"shr": "shr.b32", "shl": "shl.b32", "and": "and.b32", "bytes": "prmt.b32"}[step.name]
    return [f"{name} {to}, {', '.join(sources)};"]


def _named(line: str, registers: dict[str, str]) -> str:
    name, _, rest = line.partition(" ")
    return f"{name} {', '.join(registers.get(word, word) for word in rest.rstrip(';').split(', '))};"
