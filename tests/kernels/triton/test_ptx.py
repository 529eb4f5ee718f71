"""The PTX that decodes codes, run by a small model of its instructions: what no interpreter of Triton's executes."""

import re
import struct

import pytest
import torch

from hqqtensor.kernels.triton import ptx
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


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
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

    def pairs(dtype, function):
        return lambda *args: from_halves(function(*(halves(a, dtype) for a in args)), dtype)

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, b: a << min(b, 32),
        "shr.b32": lambda a, b: a >> min(b, 32),
        "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> (n & 31),
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
        values = [registers[s] if s[0] in "t$" else int(s.replace("0f", "0x"), 0) for s in sources]
        registers[target] = operations[name](*values) & MASK
    return registers


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_ptx_decodes_every_code_of_a_block(nbits: int, dtype: str) -> None:
    codes = torch.randint(0, 2**nbits, (BLOCK,), generator=torch.manual_seed(nbits), dtype=torch.uint8)
    row = pack(codes, nbits).tolist()
    planes = PLANES[nbits]
    starts = [16 * sum(planes[:i]) for i in range(len(planes))]
    text, constraints = ptx.decoder(nbits, dtype)
    positions, width = 8 // planes[0], 16 * planes[0]
    assert constraints.count("=&r") == 2 * positions
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    got = torch.zeros(BLOCK)
    for column in range(0, width, 4):
        inputs = []
        for plane, start in zip(planes, starts, strict=True):
            first = start + column % (16 * plane)
            inputs.append(int.from_bytes(bytes(row[first : first + 4]), "little"))
        inputs += [column // (16 * plane) * plane * 0x01010101 for plane in planes[1:]]
        named = {f"${2 * positions + i}": value for i, value in enumerate(inputs)}
        registers = execute(text, named)
        for j in range(positions):
            values = torch.cat([halves(registers[f"${2 * j + i}"], kind) for i in (0, 1)])
            got[width * j + column : width * j + column + 4] = values
    assert torch.equal(got, codes.float())


def test_the_model_refuses_what_it_does_not_know() -> None:
    with pytest.raises(KeyError):
        execute("{\nmul.f32 t0, t0, t0;\n}", {"t0": 1})
