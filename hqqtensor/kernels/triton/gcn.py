"""Decoding on AMD (gfx9): machine instructions on pairs of 16-bit lanes.

Four bytes in a register, as on NVIDIA, are no type that the compiler would hand to a text. It hands over the planes'
bytes of each column in a register, which it joins by one permutation. Words of two bytes it hands over as they were
loaded: no joining, but even and odd columns then come apart ("paired").
"""

from hqqtensor.kernels.triton.words import Decoder, Step, Steps, halves


def decoder(nbits: int, half: str, exact: bool, paired: bool = False) -> Decoder:
    """Decoder of integer codes of ``nbits``, 1 to 7, to "fp16" or "bf16"; ValueError for an exact one of bfloat16, for
    there is no packed subtraction.

    Inputs: for each of four columns a register of its planes' bytes, the first plane's lowest; two registers of two
    16-bit shift counts for each plane whose bits lie in the same byte for several columns; each constant four times, as
    Triton hands them over. Paired: a register of two words of two columns of each plane, one of two shift counts, each
    constant twice; outputs are then those of the words' lower bytes and upper bytes, position by position.
    """
    if half == "bf16" and exact:
        raise ValueError(f"AMD has no packed subtraction of bfloat16, so nothing exact at {nbits} bits")
    plan: _Lanes | _Pairs
    if paired:
        plan = _Pairs(nbits, half, exact)
        inputs = [f"p{i}" for i in range(len(plan.planes))] + [f"s{i}" for i in plan.shifted]
    else:
        plan = _Lanes(nbits, half, exact)
        inputs = [f"c{i}" for i in range(4)] + [f"s{i}_{half}" for i in plan.shifted for half in (0, 1)]
    copies = 2 if paired else 4
    registers = {name: f"${i}" for i, name in enumerate(plan.outputs + inputs)}
    registers |= {name: f"${place}" for name, place in _places(plan).items()}
    first = len(plan.outputs) + len(inputs)
    constants: list[tuple[str, int]] = []

    def constant(kind: str, value: int) -> str:
        """An operand in a scalar ("s") or a vector ("v") register: only one scalar may enter an instruction."""
        if (kind, value) not in constants:
            constants.append((kind, value))
        return f"${first + copies * constants.index((kind, value))}"

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
        # pick: for each byte of a pair of registers, which (0 to 3 of the first, 4 to 7 of the second, 12: zero)
        return f"v_perm_b32 {to}, {words[1]}, {words[0]}, {constant('s', numbers[2])}"

    # A product may read what was written no sooner than two states later, and the compiler does not look in here.
    text = "\n".join([*(line(step) for step in plan.steps), "s_nop 1"])
    kinds = ["=&v"] * len(plan.outputs) + ["v"] * len(inputs) + [kind for kind, _ in constants for _ in range(copies)]
    return plan.decoder(text, kinds, tuple(value for _, value in constants))


class _Lanes(Steps):
    """Columns "c0" to "c3", shift counts "s<plane>_<half>"."""

    def __init__(self, nbits: int, half: str, exact: bool) -> None:
        super().__init__(nbits, half, exact)
        if nbits > 4:  # room to work in, which the kernel takes for a position that it does not ask for
            self.outputs += [f"spare{i}" for i in (0, 1)]
        if len(self.planes) > 1:  # to where the bits of the first plane end, and of the first two
            self.shifts = ((8 - self.planes[0], 1), (6, -1))
        for h in (0, 1):
            columns = f"c{2 * h}", f"c{2 * h + 1}"
            lanes = self.op("pick", *columns, 0x06040200)
            if len(self.planes) == 1:
                lanes, step = self.op("shr", lanes, f"s0_{h}") if nbits == 1 else lanes, max(2, nbits)
                for position in range(8 // step):
                    self.field(lanes, position * step, position, h)
                continue
            high = self.op("shr", lanes, f"s1_{h}")
            if nbits == 7:
                third = self.op("shl", self.op("pick", *columns, 0x0C070C03), f"s2_{h}")
                high = self.op("select", high, third, halves(0x330))
            if nbits == 3:
                even = self.op("select", lanes, high, halves(0x33))
                odd = self.op("shr", self.op("select", lanes, high, halves(0xCC)), 2)
                # Positions that share a group have one offset.
                for source, bit, position in ((even, 0, 0), (even, 4, 2), (odd, 0, 1), (odd, 4, 3)):
                    self.field(source, bit, position, h)
            else:
                for position in (0, 1):
                    joined = self.op("select", lanes, high, halves(0x0F << 4 * position))
                    self.field(joined, 4 * position, position, h)


class _Pairs(Steps):
    """Two words of two bytes in a register: planes "p0" to "p2", shift counts "s0" to "s2". The number of position J of
    the words' byte H is "o<2 J + H>"."""

    def __init__(self, nbits: int, half: str, exact: bool) -> None:
        super().__init__(nbits, half, exact)
        step = max(2, self.planes[0])
        words = ["p0"]
        if nbits == 1:
            words = [self.op("shr", "p0", "s0")]
        elif len(self.planes) > 1:
            high = self.op("shr", "p1", "s1")
            if nbits == 7:
                high = self.op("select", high, self.op("shl", self.op("shr", "p2", "s2"), 2), halves(0x3333))
            low = halves(0x3333 if step == 2 else 0x0F0F)
            even = self.op("select", "p0", self.op("shl", high, step), low)
            words = [even, self.op("select", self.op("shr", "p0", step), high, low)]
        for i, word in enumerate(words):
            for byte in (0, 1):
                source = self.op("shr", word, 8) if byte else word
                for position in range(i, 8 // step, len(words)):
                    self.field(source, step * (position - i), position, byte)


def _places(plan: Steps) -> dict[str, int]:
    """Temporary registers lie in outputs that are written later: the output's number by temporary name."""
    last = {source: i for i, step in enumerate(plan.steps) for source in step.sources if isinstance(source, str)}
    never = len(plan.steps)
    written = {
        n: min([i for i, step in enumerate(plan.steps) if step.target == n], default=never) for n in plan.outputs
    }
    places: dict[str, int] = {}
    for i, step in enumerate(plan.steps):
        if step.target in plan.outputs:
            continue
        taken = {places[name] for name in places if last[name] > i}
        # An output that is written by the step that reads the temporary last will do: sources are read first.
        free = [n for n, name in enumerate(plan.outputs) if n not in taken and written[name] >= last[step.target]]
        places[step.target] = min(free, key=lambda n: written[plan.outputs[n]])
    return places
