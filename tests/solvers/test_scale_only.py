"""Solvers of formats without zero points, learned codebooks, and zero points on a coarse grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.formats import Levels, get_format
from hqqtensor.solvers import get_solver
from hqqtensor.solvers.base import SolverOptions
from hqqtensor.solvers.codebook import learn
from hqqtensor.solvers.scale_only import fit_scales, reaching_scale

KINDS = [("fp4", 4), ("nf4", 4), ("fp6", 6), ("fp8", 8), ("codebook", 4), ("codebook", 2), ("codebook", 1), ("int", 4)]


def weights(kind: str, rows: int = 48, columns: int = 192, seed: int = 0) -> torch.Tensor:
    generator = torch.manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    if kind == "heavy tails":
        w = w * torch.rand(rows, columns, generator=generator).sub_(1.0).neg_().pow(-0.5)
    if kind == "one side":
        w = w.abs() + 0.1
    if kind == "two values":
        w = w.sign() * 0.3
    return w * 0.02


DATA = ["normal", "heavy tails", "one side", "two values"]


def group_errors(q: HQQTensor, w: torch.Tensor) -> torch.Tensor:
    return (q.dequantize() - w).square().unflatten(1, (-1, q.group_size)).sum(-1)


@pytest.mark.parametrize(("name", "nbits"), KINDS)
@pytest.mark.parametrize("data", DATA)
def test_joint_is_no_worse_than_rtn_in_any_group(name: str, nbits: int, data: str) -> None:
    w, levels = weights(data), get_format(name).levels(nbits)
    groups = w.unflatten(1, (-1, 64))
    if name == "codebook":
        levels = Levels.between(learn([groups], nbits, False, torch.float32)[0])
    errors = {}
    for solver in ("rtn", "hqq_joint"):
        found = get_solver(solver)(groups, nbits, SolverOptions(levels=levels))
        inverse = found.inverse_scale.unsqueeze(-1)
        if levels is None:
            zero = found.zero_point.unsqueeze(-1)
            back = ((groups * inverse + zero).round().clamp(0, 2**nbits - 1) - zero) / inverse
        else:
            back = levels.at(levels.nearest(groups * inverse)) / inverse
        errors[solver] = (back - groups).square().sum(-1)
    assert (errors["hqq_joint"] <= errors["rtn"] * (1 + 1e-5) + 1e-12).all()
    if data != "two values":
        assert errors["hqq_joint"].sum() < 0.97 * errors["rtn"].sum()


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(["fp4", "nf4"]), size=st.integers(2, 40), seed=st.integers(0, 2**20))
def test_scales_are_near_the_best_of_a_fine_grid(name: str, size: int, seed: int) -> None:
    w = torch.randn(1, 20, size, generator=torch.manual_seed(seed))
    levels = get_format(name).levels(4)
    reach = torch.cat([reaching_scale(w, levels), reaching_scale(w, levels, -1.0)], -1)
    grid = (reach.unsqueeze(-1) * torch.linspace(0.3, 1.2, 200)).flatten(-2).unsqueeze(-2)

    def error(s: torch.Tensor) -> torch.Tensor:
        x = w.unsqueeze(-1)
        return (levels.at(levels.nearest(x / s)) * s - x).square().sum(-2).amin(-1)

    found, best = error(fit_scales(w, levels, 2.0).unsqueeze(-1)), error(grid)
    assert found.sum() <= 1.05 * best.sum()


def test_a_negative_scale_mirrors_asymmetric_levels() -> None:
    levels = get_format("nf4").levels(4)
    for sign in (1.0, -1.0):
        w = (levels.values * sign * 0.01).view(1, 1, 16)
        s = fit_scales(w, levels, 2.0)
        torch.testing.assert_close(levels.at(levels.nearest(w / s)) * s, w)
        assert s.sign() == sign


@pytest.mark.parametrize("lp_norm", [0.7, 1.0])
@pytest.mark.parametrize("name", ["fp4", "nf4"])
def test_a_lower_norm_lowers_the_error_in_that_norm(name: str, lp_norm: float) -> None:
    w = weights("heavy tails")
    errors = [
        (HQQTensor.from_hp(w, HqqConfig(4, 64, format=name, lp_norm=p)).dequantize() - w).abs().pow(lp_norm).sum()
        for p in (2.0, lp_norm)
    ]
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("name", ["fp4", "nf4", "fp6", "fp8", "codebook"])
def test_zero_tiny_and_huge_groups(name: str) -> None:
    nbits = get_format(name).widths[-1]
    w = torch.randn(5, 64, generator=torch.manual_seed(0))
    w[0], w[1], w[2], w[3] = 0.0, w[1] * 1e-30, w[2] * 1e20, 0.25
    for solver in ("rtn", "hqq_joint"):
        d = HQQTensor.from_hp(w, HqqConfig(nbits, 64, format=name, solver=solver)).dequantize()
        assert torch.equal(d[0], w[0])
        for row in (1, 2, 3, 4):
            unit = w[row].abs().amax()
            assert ((d[row] - w[row]) / unit).square().sum() < 0.03 * (w[row] / unit).square().sum()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("data", DATA)
def test_a_learned_codebook_is_no_worse_than_nf4_on_its_own_weights(per_row: bool, data: str) -> None:
    w = weights(data)
    options = {"format": "codebook", "codebook": "row" if per_row else "tensor", "scale_dtype": torch.float32}
    learned = group_errors(HQQTensor.from_hp(w, HqqConfig(4, 64, **options)), w)
    nf4 = group_errors(HQQTensor.from_hp(w, HqqConfig(4, 64, format="nf4", scale_dtype=torch.float32)), w)
    assert learned.sum() <= nf4.sum() * (1 + 1e-5)
    if data in ("normal", "one side"):
        assert learned.sum() < 0.98 * nf4.sum()


def test_a_learned_codebook_finds_the_values_that_are_there() -> None:
    generator = torch.manual_seed(0)
    entries = torch.tensor([-1.0, -0.1, 0.3, 0.8])
    scale = 1 + torch.rand(16, 4, 1, generator=generator)
    w = (entries[torch.randint(0, 4, (16, 4, 64), generator=generator)] * scale).flatten(1)
    q = HQQTensor.from_hp(w, HqqConfig(2, 64, format="codebook", scale_dtype=torch.float32))
    assert (q.dequantize() - w).square().sum() < 1e-6 * w.square().sum()


def test_codebooks_of_rows_do_not_depend_on_the_other_rows() -> None:
    w = weights("normal")
    options = HqqConfig(3, 64, format="codebook", codebook="row")
    whole, part = HQQTensor.from_hp(w, options), HQQTensor.from_hp(w[10:20].clone(), options)
    assert torch.equal(whole[10:20].zero_point, part.zero_point)
    assert torch.equal(whole[10:20].dequantize(), part.dequantize())


def squared_error(w: torch.Tensor, **options) -> float:
    return (HQQTensor.from_hp(w, HqqConfig(**options)).dequantize() - w).square().sum().item()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("solver", ["rtn", "hqq_joint"])
def test_integer_zero_points_are_integers_and_better_than_rounded_ones(axis: int, solver: str) -> None:
    w = weights("normal", 50, 200)
    options = {"nbits": 4, "group_size": 32, "axis": axis, "solver": solver}
    q = HQQTensor.from_hp(w, HqqConfig(**options, integer_zero=True))
    assert torch.equal(q.zero_point, q.zero_point.round())
    if solver == "hqq_joint":
        free = HQQTensor.from_hp(w, HqqConfig(**options))
        scale, zero = free.scale.float(), free.zero_point.float().round()
        rounded = free.with_data(zero_point=zero)
        codes = w.clone()  # nearest codes for the rounded zero points
        for g in range(scale.shape[1 if axis == 1 else 0]):
            on = (slice(None), slice(g * 32, g * 32 + 32)) if axis == 1 else slice(g, None, scale.shape[0])
            s, z = (t[:, g : g + 1] if axis == 1 else t[g] for t in (scale, zero))
            codes[on] = ((w[on] / s + z).round().clamp(0, 15) - z) * s
        assert rounded.zero_point.dtype == torch.float32
        assert (q.dequantize() - w).square().sum() < 0.95 * (codes - w).square().sum()


def test_8_bits_with_bfloat16_zero_points_keep_most_of_their_precision() -> None:
    w = weights("normal", 64, 512)
    exact, coarse = (squared_error(w, nbits=8, scale_dtype=d) for d in (torch.float32, torch.bfloat16))
    assert coarse < 1.16 * exact  # rounded at the end: 1.20


def test_integer_zero_is_refused_where_there_is_none() -> None:
    for options in ({"format": "nf4"}, {"solver": "hqq"}, {"quant_zero": True}):
        with pytest.raises(ValueError, match="integer_zero"):
            HqqConfig(4, 64, integer_zero=True, **options)
