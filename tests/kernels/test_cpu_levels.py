"""Formats without zero points in C++, solved, learned and packed, against the plain ones."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.formats import Levels, TableFormat, base, get_format
from hqqtensor.kernels import cpu
from hqqtensor.packing import row_bytes, unpack
from hqqtensor.solvers.codebook import TORCH_PASSES, learn, starting_entries

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

FIXED = [("fp4", 4), ("nf4", 4), ("fp6", 6), ("fp8", 8)]
KINDS = [
    *((name, nbits, "tensor") for name, nbits in FIXED),
    *(("codebook", nbits, "tensor") for nbits in (1, 2, 3, 4)),
]
BY_ROW = [("codebook", nbits, "row") for nbits in (2, 4)]

shapes = {
    "group_size": st.sampled_from([3, 16, 64, 100, None]),
    "N": st.integers(1, 150),
    "K": st.integers(1, 300),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "size": st.sampled_from([1e-3, 0.02, 30.0]),
}


def config(kind: tuple[str, int, str], group_size: int | None, extent: int, **others) -> HqqConfig:
    name, nbits, codebook = kind
    chosen = None if group_size is None else min(group_size, extent)
    return HqqConfig(nbits, chosen, format=name, codebook=codebook, **others)


def both(w: torch.Tensor, settings_: HqqConfig) -> tuple[HQQTensor, HQQTensor]:
    with backend("cpu"):
        fast = HQQTensor.from_hp(w, settings_)
    with backend("reference"):
        return fast, HQQTensor.from_hp(w, settings_)


def group_errors(q: HQQTensor, w: torch.Tensor) -> torch.Tensor:
    """Squared errors of the groups, of the shape of the scales."""
    with backend("reference"):
        error = (q.dequantize(torch.float32) - w.float()).square()
    out = torch.zeros(q.scale.shape)
    if q.axis == 1:
        return out.index_add_(1, torch.arange(w.shape[1]) // (q.group_size or w.shape[1]), error)
    return out.index_add_(0, torch.arange(w.shape[0]) % len(out), error)


@pytest.mark.parametrize(("name", "nbits"), FIXED)
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_those_of_torch_ties_included(name: str, nbits: int, axis: int) -> None:
    fmt = get_format(name)
    values = fmt.levels(nbits).values
    ties = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(ties, ties + sign) for sign in (1, -1))
    tiny = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45])
    w = torch.cat([values, ties, up, down, 2 * values, 1e30 * values, tiny]).unsqueeze(0)
    K = w.shape[1]
    out = torch.empty(1, row_bytes(K, nbits), dtype=torch.uint8)
    inverse = torch.ones(1, K if axis == 0 else 1)
    cpu.assign_levels(out, w, inverse, fmt.levels(nbits), nbits, K if axis == 1 else 1, axis, name)
    assert torch.equal(unpack(out, nbits, K), fmt.encode(w, torch.ones(1, 1), None, nbits))


@settings(deadline=None, max_examples=examples(60))
@given(kind=st.sampled_from(KINDS[:4]), axis=st.sampled_from([0, 1]), **shapes)
def test_rtn_equals_the_plain_one_to_the_last_bit(kind, axis, group_size, N, K, dtype, size) -> None:
    w = (torch.randn(N, K, generator=torch.manual_seed(0)) * size).to(dtype)
    fast, plain = both(w, config(kind, group_size, K if axis == 1 else N, axis=axis, solver="rtn"))
    assert torch.equal(fast.scale, plain.scale) and torch.equal(fast.qdata, plain.qdata)


@settings(deadline=None, max_examples=examples(60))
@given(kind=st.sampled_from(KINDS[:4]), axis=st.sampled_from([0, 1]), **shapes)
def test_joint_equals_the_plain_one_up_to_rounding(kind, axis, group_size, N, K, dtype, size) -> None:
    w = (torch.randn(N, K, generator=torch.manual_seed(0)) * size).to(dtype)
    fast, plain = both(w, config(kind, group_size, K if axis == 1 else N, axis=axis, scale_dtype=torch.float32))
    check_errors(group_errors(fast, w), group_errors(plain, w), 1e-9 * size**2)


def check_errors(errors: torch.Tensor, expected: torch.Tensor, slack: float) -> None:
    """Sums are taken in another order; now and then that moves a code at a tie, and with it where its group settles."""
    far = (errors - expected).abs() > 1e-3 * expected + 100 * slack
    assert far.sum() <= max(2, 0.02 * far.numel())
    assert abs(errors.sum() - expected.sum()) <= 0.01 * expected.sum() + slack * errors.numel()


@settings(deadline=None, max_examples=examples(40))
@given(
    nbits=st.integers(1, 4), by_row=st.booleans(), R=st.integers(1, 40), C=st.integers(1, 40), size=st.integers(1, 70)
)
def test_groups_fitted_to_given_entries_equal_the_plain_ones_up_to_rounding(nbits, by_row, R, C, size) -> None:
    generator = torch.manual_seed(0)
    w = torch.randn(R, C, size, generator=generator)
    entries = (torch.rand(R, 2**nbits, generator=generator) * 2 - 1).sort().values
    levels = Levels.between(entries if by_row and R > 1 else entries[0])
    errors = []
    for passes in (cpu.LloydPasses(), TORCH_PASSES):
        s = passes.fit(w, levels)
        errors.append((levels.at(levels.nearest(w / s)) * s - w).square().sum(-1))
    check_errors(*errors, 1e-9)


LEARNED = [(kind, 40, 0, torch.float16) for kind in KINDS[4:]]
LEARNED += [
    (kind, *other) for kind in KINDS[4:] + BY_ROW for other in ((64, 1, torch.float32), (24, 1, torch.bfloat16))
]


@pytest.mark.parametrize(("kind", "group_size", "axis", "dtype"), LEARNED)
def test_learned_codebooks_are_as_good_as_the_plain_ones(kind, group_size, axis, dtype) -> None:
    w = (torch.randn(90, 200, generator=torch.manual_seed(0)) * 0.02).to(dtype)
    fast, plain = both(w, config(kind, group_size, 90, axis=axis))
    assert fast.zero_point.shape == plain.zero_point.shape and fast.zero_point.dtype == plain.zero_point.dtype
    assert group_errors(fast, w).sum() <= 1.005 * group_errors(plain, w).sum()


def test_joint_on_many_groups_gives_the_same_codes() -> None:
    w = torch.randn(128, 512, generator=torch.manual_seed(1)) * 0.02
    for name, nbits in FIXED:
        fast, plain = both(w, HqqConfig(nbits, 64, format=name))
        assert (unpack(fast.qdata, nbits, 512) != unpack(plain.qdata, nbits, 512)).sum() <= 0.001 * w.numel()
        assert (fast.scale != plain.scale).sum() <= 0.02 * plain.scale.numel()


def test_rounds_of_lloyd_equal_the_plain_ones() -> None:
    w = torch.randn(40, 70, 24, generator=torch.manual_seed(0))
    s = 1 + torch.rand(40, 70, 1, generator=torch.manual_seed(1))
    for entries in (starting_entries(4)[0], starting_entries(2)[0].repeat(40, 1)):
        levels = Levels.between(entries)
        for found, expected in zip(cpu.LloydPasses().step(w, s, levels), TORCH_PASSES.step(w, s, levels), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        fits = [passes.fit(w, levels) for passes in (cpu.LloydPasses(), TORCH_PASSES)]
        assert ((fits[0] - fits[1]).abs() > 1e-5 * fits[1].abs()).sum() <= 0.02 * fits[1].numel()


def test_learned_entries_equal_the_plain_ones() -> None:
    w = torch.randn(48, 6, 32, generator=torch.manual_seed(0)) * 0.02
    for per_row in (False, True):
        fast, plain = (learn([w], 4, per_row, torch.float32, p) for p in (cpu.LloydPasses(), TORCH_PASSES))
        assert ((fast - plain).abs() > 1e-3).sum() <= 0.02 * plain.numel()


def test_groups_of_zeros_and_of_very_small_and_large_weights() -> None:
    w = torch.randn(5, 64, generator=torch.manual_seed(0))
    w[0], w[1], w[2], w[3] = 0.0, w[1] * 1e-30, w[2] * 1e20, -0.25
    for kind in (*KINDS, *BY_ROW):
        for solver in ("rtn", "hqq_joint"):
            fast, plain = both(w, config(kind, 64, 64, solver=solver, scale_dtype=torch.float32))
            assert torch.equal(fast.dequantize()[0], w[0])
            unit = w[1:].abs().amax(1, keepdim=True)
            errors = [((q.dequantize()[1:] - w[1:]) / unit).square().sum() for q in (fast, plain)]
            assert errors[0] <= 1.001 * errors[1] + 1e-9


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    w = torch.randn(40, 1700, generator=torch.manual_seed(0))  # large enough to be shared out in each operator
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            kinds = [(kind, axis) for kind in KINDS for axis in (0, 1)] + [(kind, 1) for kind in BY_ROW]
            found.append([HQQTensor.from_hp(w, config(kind, 16, 40, axis=axis)) for kind, axis in kinds])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def ternary():
    table = torch.tensor([0.0, 1.0, -1.0, float("nan")])
    levels = Levels.between(torch.tensor([-1.0, 0.0, 1.0]))
    fmt = TableFormat("three of one's own", table, levels, torch.tensor([2, 0, 1], dtype=torch.uint8))
    base.register_format(fmt)
    yield fmt
    del base._FORMATS["three of one's own"]


def test_a_format_of_ones_own_is_solved_and_packed_by_its_table(ternary) -> None:
    w = torch.randn(30, 70, generator=torch.manual_seed(0))
    fast, plain = both(w, HqqConfig(2, 10, format="three of one's own"))
    assert torch.equal(fast.qdata, plain.qdata)
    assert set(unpack(fast.qdata, 2, 70).unique().tolist()) == {0, 1, 2}


def test_other_norms_take_the_plain_path() -> None:
    fast, plain = both(torch.randn(16, 64, generator=torch.manual_seed(0)), HqqConfig(4, 64, format="nf4", lp_norm=0.7))
    assert torch.equal(fast, plain)


def test_levels_that_do_not_fit_are_refused() -> None:
    w, fp8 = torch.randn(3, 16), get_format("fp8")
    with pytest.raises(RuntimeError, match="levels of 2 rows for 3"):
        cpu.solve_levels(w, Levels.between(torch.eye(2)), 16, 1, "rtn", "codebook")
    with pytest.raises(RuntimeError, match="levels must be up to 16"):
        levels = (fp8.levels(8).values, fp8.levels(8).thresholds, fp8.codes, -1, 0.0)
        torch.ops.hqqtensor._solve_levels(w, *levels, 16, 1, "rtn")
    with pytest.raises(RuntimeError, match="no kernel for solver 'hqq'"):
        cpu.solve_levels(w, fp8.levels(8), 16, 1, "hqq", "fp8")
