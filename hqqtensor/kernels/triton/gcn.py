"""Decoding on AMD (gfx9): two bytes of each plane in a register, a byte in each 16-bit lane; machine instructions.

Four bytes in a register, as on NVIDIA, are no type that the compiler would hand to a text. It widens them to lanes by
the same permutation that would be needed here.
"""

from hqqtensor.kernels.triton.words import Decoder, Step, Steps, halves


def decoder(nbits: int, half: str, exact: bool) -> Decoder:
    """Decoder of integer codes of ``nbits`` to "fp16" or "bf16"; ValueError for an exact one of bfloat16 below 8 bits,
    for there is no packed subtraction.

    Inputs: two registers of two lanes of each plane, then the same of shift counts for each plane whose bits lie in the
    same byte for several columns, then each constant four times, as Triton hands them over.
    """
    if half == "bf16" and exact and nbits < 8:
        raise ValueError(f"AMD has no packed subtraction of bfloat16, so nothing exact at {nbits} bits")
    plan = _Lanes(nbits, half, exact)
    inputs = [f"{name}{i}_{h}" for name, which in (("p", range(len(plan.planes))), ("s", plan.shifted)) for i in which
              for h in (0, 1)]  # fmt: skip
    registers = {name: f"${i}" for i, name in enumerate(plan.outputs + inputs)}
    registers |= {name: f"${place}" for name, place in _places(plan).items()}
    first = len(plan.outputs) + len(inputs)
    constants: list[tuple[str, int]] = []

    def constant(kind: str, value: int) -> str:
        """An operand in a scalar ("s") or a vector ("v") register: only one scalar may enter an instruction."""
        if (kind, value) not in constants:
            constants.append((kind, value))
        return f"${first + 4 * constants.index((kind, value))}"

    def line(step: Step) -> str:
        to = registers[step.target]
        words = [registers[s] if isinstance(s, str) else str(s) for s in step.sources]
        numbers = [0 if isinstance(s, str) else s for s in step.sources]
        if step.name in ("shr", "shl"):
            packed = isinstance(step.sources[1], str)  # a count for each lane
            return f"v_{'pk_' * packed}lsh{step.name[2]}rev_b{16 if packed else 32} {to}, {words[1]}, {words[0]}"
        if step.name == "select":
            return f"v_bfi_b32 {to}, {constant('s', numbers[2])}, {words[0]}, {words[1]}"
        if step.name == "field":
            return f"v_and_or_b32 {to}, {words[0]}, {constant('s', numbers[1])}, {constant('v', numbers[2])}"
        if step.name == "less":
            return f"v_pk_add_f16 {to}, {words[0]}, {constant('s', numbers[1] | 0x80008000)}"
        if step.name == "float":
            return f"v_cvt_f32_ubyte{numbers[1]} {to}, {words[0]}"
        order = sum((numbers[2] >> 4 * i & 15) << 8 * i for i in range(4))
        return f"v_perm_b32 {to}, {words[1]}, {words[0]}, {constant('s', order)}"

    # A product may read what was written no sooner than two states later, and the compiler does not look in here.
    text = "\n".join([*(line(step) for step in plan.steps), "s_nop 1"])
    kinds = ["=&v"] * len(plan.outputs) + ["v"] * len(inputs) + [kind for kind, _ in constants for _ in range(4)]
    return plan.decoder(text, kinds, tuple(value for _, value in constants))


class _Lanes(Steps):
    """Planes "p<i>_<half>", shift counts "s<i>_<half>"."""

    def __init__(self, nbits: int, half: str, exact: bool) -> None:
        super().__init__(nbits, half, exact)
        for h in (0, 1):
            lanes = [f"p{i}_{h}" for i in range(len(self.planes))]
            for i in self.shifted:
                lanes[i] = self.op("shl" if nbits == 3 else "shr", lanes[i], f"s{i}_{h}")
            if nbits == 8 and half == "bf16":
                # No room for 8 bits below the leading one, so by float32, whose upper halves are the numbers.
                pair = [self.op("float", lanes[0], byte) for byte in (0, 2)]
                self.op("bytes", *pair, 0x7632, to=f"o{h}")
            elif nbits == 3:
                even = self.op("select", lanes[0], lanes[1], halves(0x33))
                odd = self.op("select", lanes[0], lanes[1], halves(0xCC))
                odd = self.op("shr", odd, 2)  # positions that share a group then have one offset
                for word, bit, position in ((even, 0, 0), (even, 4, 2), (odd, 0, 1), (odd, 4, 3)):
                    self.field(word, bit, position, h)
            elif len(self.planes) == 1:
                step = max(2, nbits)
                for position in range(8 // step):
                    self.field(lanes[0], position * step, position, h)
            else:
                high = lanes[1]
                if nbits == 7:
                    high = self.op("select", high, self.op("shl", lanes[2], 2), halves(0x33))
                self.field(self.op("select", lanes[0], self.op("shl", high, 4), halves(0x0F)), 0, 0, h)
                self.field(self.op("select", self.op("shr", lanes[0], 4), high, halves(0x0F)), 0, 1, h)


def _places(plan: Steps) -> dict[str, int]:
    """Temporary registers lie in outputs that are written later: the output's number by temporary name."""
    last = {source: i for i, step in enumerate(plan.steps) for source in step.sources if isinstance(source, str)}
    written = {name: min(i for i, step in enumerate(plan.steps) if step.target == name) for name in plan.outputs}
    places: dict[str, int] = {}
    for i, step in enumerate(plan.steps):
        if step.target in plan.outputs:
            continue
        taken = {places[name] for name in places if last[name] > i}
        free = [n for n, name in enumerate(plan.outputs) if n not in taken and written[name] >= last[step.target]]
        places[step.target] = min(free, key=lambda n: written[plan.outputs[n]])
    return places
