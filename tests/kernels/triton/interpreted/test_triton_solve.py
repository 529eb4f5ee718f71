"""The solver and packing kernels by Triton's interpreter against the plain solvers."""

import pytest
import torch

from hqqtensor import HqqConfig
from hqqtensor.encode import solve_matrix
from hqqtensor.kernels.triton import launch
from hqqtensor.ops import backend
from hqqtensor.ops.reference import expand_groups
from hqqtensor.packing import pack, row_bytes, unpack

SHAPES = [(6, 200, 64, 1), (50, 20, 16, 0), (4, 256, 256, 1), (7, 100, 12, 1), (33, 9, 33, 0)]
# Each width, and each shape with two: to a solver, a width is the largest code.
SOLVED = [(i % 8 + 1, *SHAPES[i % 5]) for i in range(10)]
# Each width with three shapes, each shape with three widths or more: here both decide where bits go.
PACKED_SHAPES = [*SHAPES, (20, 130, 65, 1), (5, 3, 2, 1)]
PACKED = [(nbits, *PACKED_SHAPES[(nbits + 2 * i) % 7]) for nbits in range(1, 9) for i in range(3)]


def matrix(N: int, K: int, axis: int) -> torch.Tensor:
    w = torch.randn(N, K, generator=torch.manual_seed(N)) * 0.02
    if axis == 1:  # groups of one value: positive, negative, zero
        w[0], w[1], w[2] = 0.5, -0.3, 0.0
    return w


def error(w: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, nbits: int, size: int, axis: int) -> torch.Tensor:
    full = [expand_groups(t, *w.shape, size, axis).double() for t in (inverse, zero)]
    codes = (w.double() * full[0] + full[1]).round().clamp(0, 2**nbits - 1)
    return ((codes - full[1]) / full[0] - w.double()).square().sum()


@pytest.mark.parametrize(("nbits", "N", "K", "size", "axis"), SOLVED)
def test_rtn_is_the_plain_solver(nbits: int, N: int, K: int, size: int, axis: int) -> None:
    w = matrix(N, K, axis)
    config = HqqConfig(nbits, size, axis=axis, solver="rtn")
    with backend("reference"):
        want = solve_matrix(w, size, config)
    inverse, zero = launch.solve(w, nbits, size, axis, "rtn")
    torch.testing.assert_close(inverse, want.inverse_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(zero, want.zero_point, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("nbits", "N", "K", "size", "axis"), SOLVED)
def test_joint_reaches_the_plain_solvers_error(nbits: int, N: int, K: int, size: int, axis: int) -> None:
    w = matrix(N, K, axis)
    with backend("reference"):
        want = solve_matrix(w, size, HqqConfig(nbits, size, axis=axis))
    inverse, zero = launch.solve(w, nbits, size, axis, "hqq_joint")
    got, plain = (
        error(w, *pair, nbits, size, axis) for pair in ((inverse, zero), (want.inverse_scale, want.zero_point))
    )
    # Sums in another order may settle another way now and then, in either direction.
    assert got <= plain * 1.01 + 1e-12 and plain <= got * 1.01 + 1e-12
    # Most groups take the very same road.
    assert torch.isclose(inverse, want.inverse_scale, rtol=1e-4).double().mean() > 0.8


def test_constant_groups_come_back_exactly() -> None:
    w = matrix(4, 64, 1)[:3]
    inverse, zero = launch.solve(w, 3, 64, 1, "hqq_joint")
    codes = (w * inverse + zero).round().clamp(0, 7)
    assert torch.equal((codes - zero) / inverse, w)


@pytest.mark.parametrize(("nbits", "N", "K", "size", "axis"), PACKED)
def test_assign_packs_the_nearest_codes(nbits: int, N: int, K: int, size: int, axis: int) -> None:
    w = matrix(N, K, axis).bfloat16()
    inverse, zero = launch.solve(w, nbits, size, axis, "rtn")
    full = [expand_groups(t, N, K, size, axis) for t in (inverse, zero)]
    want = (w.float() * full[0] + full[1]).round().clamp(0, 2**nbits - 1).to(torch.uint8)
    out = torch.full((N, row_bytes(K, nbits)), 255, dtype=torch.uint8)
    launch.assign(out, w, inverse, zero, nbits, size, axis)
    assert torch.equal(unpack(out, nbits, K), want)
    assert torch.equal(out, pack(want, nbits))


def test_wrong_arguments_are_named() -> None:
    w = torch.randn(4, 64)
    with pytest.raises(ValueError, match="'hqq'"):
        launch.solve(w, 4, 64, 1, "hqq")
    with pytest.raises(ValueError, match="8192"):
        launch.solve(torch.randn(1, 8192), 4, 8192, 1, "rtn")
    with pytest.raises(ValueError, match=r"\[4, 32\]"):
        launch.assign(torch.empty(4, 31, dtype=torch.uint8), w, w[:, :1], w[:, :1], 4, 64, 1)
