"""The machine instructions that decode codes, run by a small model of them: Triton's interpreter does not run them."""

import re
import struct

import pytest
import torch

from hqqtensor.kernels.triton import gcn, ptx
from hqqtensor.kernels.triton.words import Decoder
from hqqtensor.packing import BLOCK, PLANES, pack

MASK = 0xFFFFFFFF


def halves(value: int, dtype: torch.dtype) -> torch.Tensor:
    pair = torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.int16)
    return pair.view(dtype).double()


def from_halves(values: torch.Tensor, dtype: torch.dtype) -> int:
    low, high = (int(v) & 0xFFFF for v in values.to(dtype).view(torch.int16))
    return low | high << 16


def float32(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value))[0]


def pairs(dtype: torch.dtype, function):
    return lambda *args: from_halves(function(*(halves(a, dtype) for a in args)), dtype)


def execute_ptx(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Run PTX of the instructions that ``ptx.decoder`` uses; anything else raises KeyError."""

    def prmt(a: int, b: int, order: int) -> int:
        both = (a | b << 32).to_bytes(8, "little")
        assert not any(order >> 4 * i & 8 for i in range(4)), "sign replication is not modelled"
        return int.from_bytes(bytes(both[order >> 4 * i & 7] for i in range(4)), "little")

    def lop3(a: int, b: int, c: int, table: int) -> int:
        out = 0
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            out |= (table >> index & 1) << bit
        return out

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, b: a << min(b, 32),
        "shr.b32": lambda a, b: a >> min(b, 32),
        "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> (n & 31),
        "shf.l.wrap.b32": lambda low, high, n: (high << 32 | low) << (n & 31) >> 32,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
        "sub.f16x2": pairs(torch.float16, lambda a, b: a - b),
        "fma.rn.bf16x2": pairs(torch.bfloat16, lambda a, b, c: a * b + c),
        "sub.f32": lambda a, b: struct.unpack("<I", struct.pack("<f", float32(a) - float32(b)))[0],
    }
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, rest = re.fullmatch(r"(\S+) (.*);", line).groups()
        target, *sources = rest.split(", ")
        values = [registers[s] if s[0] in "t$" else int(re.sub("^0f", "0x", s), 0) for s in sources]
        registers[target] = operations[name](*values) & MASK
    return registers


def execute_gcn(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Run the instructions of AMD's GPUs that ``gcn.decoder`` uses; anything else raises KeyError."""

    def perm(high: int, low: int, order: int) -> int:
        both = (low | high << 32).to_bytes(8, "little")
        picks = order.to_bytes(4, "little")
        assert all(pick < 8 or pick == 12 for pick in picks), "only bytes and zeros are modelled"
        return int.from_bytes(bytes(0 if pick == 12 else both[pick] for pick in picks), "little")

    def lanes(function):
        return lambda n, a: sum((function(a >> i & 0xFFFF, n >> i & 15) & 0xFFFF) << i for i in (0, 16))

    operations = {
        "v_perm_b32": perm,
        "v_bfi_b32": lambda mask, yes, no: mask & yes | ~mask & no,
        "v_and_or_b32": lambda a, b, c: a & b | c,
        "v_lshrrev_b32": lambda n, a: a >> (n & 31),
        "v_lshlrev_b32": lambda n, a: a << (n & 31),
        "v_pk_lshrrev_b16": lanes(lambda a, n: a >> n),
        "v_pk_lshlrev_b16": lanes(lambda a, n: a << n),
        "v_pk_add_f16": pairs(torch.float16, lambda a, b: a + b),
    }
    *lines, last = text.splitlines()
    assert last == "s_nop 1", "products read results two states later at the earliest"
    for line in lines:
        name, rest = line.split(maxsplit=1)
        target, *sources = rest.split(", ")
        scalars = {s for s in sources if s[0] == "$" and kind_of(s, registers) == "s"}
        assert len(scalars) <= 1, f"more than one scalar register in {line}"
        values = [registers[s] if s[0] == "$" else int(s, 0) for s in sources]
        registers[target] = operations[name](*values) & MASK
    return registers


KINDS: dict[str, str] = {}
"""Kinds of the operands of the text being run."""


def kind_of(operand: str, registers: dict[str, int]) -> str:
    assert operand in registers, f"{operand} is read before it is written"
    return KINDS.get(operand, "v")


def shift_counts(nbits: int, decoder: Decoder, column: int) -> list[int]:
    """What the planes whose bits lie in the same byte for several columns are shifted by at a column."""
    planes = PLANES[nbits] if nbits == 1 else PLANES[nbits][1:]
    counts = [column // (16 * plane) * plane for plane in planes]
    return [base + factor * n for n, (base, factor) in zip(counts, decoder.shifts, strict=False)]


def inputs_ptx(nbits: int, decoder: Decoder, planes: list[bytes], column: int) -> list[int]:
    counts = [n * 0x01010101 for n in shift_counts(nbits, decoder, column)]
    return [int.from_bytes(plane, "little") for plane in planes] + counts


def inputs_gcn(nbits: int, decoder: Decoder, planes: list[bytes], column: int) -> list[int]:
    places = (0, 16, 24)
    columns = [sum(plane[i] << place for plane, place in zip(planes, places, strict=False)) for i in range(4)]
    counts = [n * 0x00010001 for n in shift_counts(nbits, decoder, column) for _ in (0, 1)]
    return columns + counts + [value for value in decoder.constants for _ in range(4)]


CASES = [
    *(pytest.param(ptx, n, h, e, id=f"ptx-{n}-{h}-{e}") for n in range(1, 9) for h in ("fp16", "bf16") for e in (0, 1)),
    *(pytest.param(gcn, n, h, e, id=f"gcn-{n}-{h}-{e}") for n in range(1, 8) for h, e in (("fp16", 0), ("fp16", 1),
                                                                                       ("bf16", 0))),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "nbits", "half", "exact"), CASES)
def test_every_code_of_a_block_is_decoded(machine, nbits: int, half: str, exact: int) -> None:
    codes = torch.randint(0, 2**nbits, (BLOCK,), generator=torch.manual_seed(nbits), dtype=torch.uint8)
    row = bytes(pack(codes, nbits).tolist())
    planes = PLANES[nbits]
    starts = [16 * sum(planes[:i]) for i in range(len(planes))]
    decoder = machine.decoder(nbits, half, bool(exact))
    stride = max(2, planes[0])
    positions, width = 8 // stride, 16 * stride
    kinds = decoder.constraints.split(",")
    outputs = kinds.count("=&r") + kinds.count("=&v")
    assert outputs == 2 * positions + (2 if machine is gcn and nbits > 4 else 0)
    assert len(decoder.offsets) == (0 if exact or (nbits == 8 and half == "bf16") else positions)
    make, execute = (inputs_ptx, execute_ptx) if machine is ptx else (inputs_gcn, execute_gcn)
    KINDS.clear()
    KINDS.update({f"${i}": kind for i, kind in enumerate(kinds)})
    got = torch.zeros(BLOCK)
    for column in range(0, width, 4):
        firsts = [start + column % (16 * plane) for plane, start in zip(planes, starts, strict=True)]
        values = make(nbits, decoder, [row[first : first + 4] for first in firsts], column)
        assert outputs + len(values) == len(kinds)
        registers = execute(decoder.text, {f"${outputs + i}": value for i, value in enumerate(values)})
        for j in range(positions):
            kind = torch.float16 if half == "fp16" else torch.bfloat16
            numbers = torch.cat([halves(registers[f"${2 * j + i}"], kind) for i in (0, 1)])
            offset = decoder.offsets[j] if decoder.offsets else 0
            got[width * j + column : width * j + column + 4] = numbers - offset
    assert torch.equal(got, codes.float())


@pytest.mark.parametrize(("half", "exact"), [("fp16", False), ("fp16", True), ("bf16", False)])
@pytest.mark.parametrize("nbits", range(1, 8))
def test_words_of_two_bytes_are_decoded_on_amd(nbits: int, half: str, exact: bool) -> None:
    codes = torch.randint(0, 2**nbits, (BLOCK,), generator=torch.manual_seed(nbits), dtype=torch.uint8)
    row = bytes(pack(codes, nbits).tolist())
    planes = PLANES[nbits]
    starts = [16 * sum(planes[:i]) for i in range(len(planes))]
    decoder = gcn.decoder(nbits, half, exact, paired=True)
    stride = max(2, planes[0])
    positions, width = 8 // stride, 16 * stride
    kinds = decoder.constraints.split(",")
    outputs = kinds.count("=&v")
    assert outputs == 2 * positions and len(decoder.offsets) == (0 if exact else positions)
    KINDS.clear()
    KINDS.update({f"${i}": kind for i, kind in enumerate(kinds)})
    dtype = torch.float16 if half == "fp16" else torch.bfloat16
    got = torch.zeros(BLOCK)
    for column in range(0, width, 4):
        firsts = [start + column % (16 * plane) for plane, start in zip(planes, starts, strict=True)]
        values = [int.from_bytes(row[first : first + 4], "little") for first in firsts]
        values += [n * 0x00010001 for n in shift_counts(nbits, decoder, column)]
        values += [value for value in decoder.constants for _ in (0, 1)]
        assert outputs + len(values) == len(kinds)
        registers = execute_gcn(decoder.text, {f"${outputs + i}": value for i, value in enumerate(values)})
        for j in range(positions):
            for byte in (0, 1):  # columns 0 and 2, or 1 and 3
                numbers = halves(registers[f"${2 * j + byte}"], dtype)
                first = width * j + column + byte
                got[first : first + 4 - byte : 2] = numbers - (decoder.offsets[j] if decoder.offsets else 0)
    assert torch.equal(got, codes.float())


def test_bfloat16_is_not_exact_on_amd() -> None:
    with pytest.raises(ValueError, match="4 bits"):
        gcn.decoder(4, "bf16", True)


def test_the_models_refuse_what_they_do_not_know() -> None:
    with pytest.raises(KeyError):
        execute_ptx("{\nmul.f32 t0, t0, t0;\n}", {"t0": 1})
    with pytest.raises(KeyError):
        execute_gcn("v_mul_f32 $0, $1, $1\ns_nop 1", {"$1": 1})
    with pytest.raises(AssertionError, match="before it is written"):
        execute_gcn("v_lshrrev_b32 $0, 1, $1\ns_nop 1", {})
