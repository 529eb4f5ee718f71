"""Codes and levels of every format against tables written by hand and against torch."""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor.formats import CODEBOOK, FP4, FP6, FP8, NF4, Levels, TableFormat, get_format

TABLES = [FP4, FP6, FP8, NF4]
ONE = torch.tensor(1.0)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_fp4_is_the_ocp_e2m1_table() -> None:
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert same_bits(FP4.table, torch.cat([positive, -positive]))


def test_fp6_is_the_ocp_e3m2_table() -> None:
    positive = torch.tensor([
        0.0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75,
        2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0,
    ])  # fmt: skip
    assert same_bits(FP6.table, torch.cat([positive, -positive]))


def test_every_fp8_code_decodes_as_torch_e4m3fn_does() -> None:
    codes = torch.arange(256).to(torch.uint8)
    ours, torchs = FP8.decode(codes, ONE, None, 8), codes.view(torch.float8_e4m3fn).float()
    nan = torchs.isnan()
    assert nan.nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(ours.isnan(), nan) and same_bits(ours[~nan], torchs[~nan])


def test_fp8_codes_are_those_of_torch_ties_included() -> None:
    levels = FP8.levels(8).values
    ties = (levels[1:] + levels[:-1]) / 2
    around = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    x = torch.cat([levels, around, torch.randn(20000, generator=torch.manual_seed(0)) * 60]).clamp(-448, 448)
    ours, torchs = FP8.encode(x, ONE, None, 8), x.to(torch.float8_e4m3fn).view(torch.uint8)
    torchs[torchs == 0x80] = 0  # zero has one code here
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("fmt", [FP4, FP6], ids=lambda f: f.name)
def test_a_tie_goes_to_the_even_code(fmt: TableFormat) -> None:
    levels = fmt.levels(0).values
    codes = fmt.encode((levels[1:] + levels[:-1]) / 2, ONE, None, 0)
    assert (codes % 2 == 0).all()


def test_nf4_levels_follow_the_papers_formula() -> None:
    normal = NormalDist()
    first = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    positive = [normal.inv_cdf(p) for p in torch.linspace(first, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    negative = [-normal.inv_cdf(p) for p in torch.linspace(first, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    expected = torch.tensor(sorted([*positive, 0.0, *negative])) / max(positive)
    torch.testing.assert_close(NF4.table, expected, atol=1e-6, rtol=0)
    assert NF4.table[7] == 0 and NF4.table[0] == -1 and NF4.table[15] == 1


@pytest.mark.parametrize("fmt", TABLES, ids=lambda f: f.name)
def test_codes_survive_decoding_and_encoding(fmt: TableFormat) -> None:
    values = fmt.levels(0).values
    codes = fmt.encode(values, ONE, None, 0)
    assert torch.equal(fmt.decode(codes, ONE, None, 0), values)
    assert len(codes.unique()) == len(values)


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(["fp4", "fp6", "fp8", "nf4"]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_codes_are_the_nearest_and_never_nan(name: str, scale: float, seed: int) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, TableFormat)
    x = torch.randn(8, 50, generator=torch.manual_seed(seed)) * 3 * scale
    found = fmt.decode(fmt.encode(x, torch.tensor(1 / scale), None, 0), ONE, None, 0)
    distance = ((x / scale).double().unsqueeze(-1) - fmt.table.nan_to_num(torch.inf).double()).abs()
    assert found.isfinite().all()
    nearest = distance.amin(-1)
    assert (((x / scale).double() - found).abs() <= nearest * (1 + 1e-6) + 1e-6).all()


@settings(deadline=None, max_examples=50)
@given(nbits=st.integers(1, 4), rows=st.sampled_from([1, 6]), seed=st.integers(0, 2**20))
def test_learned_codes_are_the_nearest_of_their_row(nbits: int, rows: int, seed: int) -> None:
    generator = torch.manual_seed(seed)
    entries = torch.randn(rows, 2**nbits, generator=generator).sort(-1).values
    x = torch.randn(6, 40, generator=generator)
    codes = CODEBOOK.encode(x, ONE, entries, nbits)
    found = CODEBOOK.decode(codes, ONE, entries, nbits)
    brute = (x.unsqueeze(-1) - entries.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((x - found).abs(), brute, atol=1e-6, rtol=1e-6)


def test_a_number_beyond_the_levels_takes_the_outermost() -> None:
    levels = Levels.between(torch.tensor([-1.0, 0.0, 2.0]))
    assert levels.nearest(torch.tensor([-9.0, -0.5, -0.49, 1.0, 1.01, 9.0])).tolist() == [0, 0, 1, 1, 2, 2]
