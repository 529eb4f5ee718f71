"""Dense panels, what integer kernels leave to them: many rows of activations, on every instruction set here."""

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu import assert_linear, dense, weight

from hqqtensor import HQQTensor, backend
from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

# Formats, bits and axes that integers serve not at all, or dearly where there are many rows.
DENSE = [
    *[("int", nbits, 0) for nbits in range(1, 9)],
    *[("int", nbits, 1) for nbits in (3, 4, 8)],
    ("nf4", 4, 1),
    ("fp6", 6, 0),
    ("fp6", 6, 1),
    ("fp8", 8, 0),
    ("fp8", 8, 1),
    ("codebook", 3, 0),
    ("codebook rows", 2, 1),
    ("codebook rows", 4, 1),
]
# Few groups and many; on axis 1, but for the last, none that integers take.
SIZES = {0: [1, 3, 16, 64, None], 1: [1, 3, 18, 50, 96]}


def activations(M: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)


@settings(deadline=None, max_examples=examples(120))
@given(
    kind=st.sampled_from(DENSE),
    size=st.integers(0, 4),
    N=st.integers(1, 300),
    K=st.integers(8, 900),
    M=st.integers(17, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
)
def test_many_rows_equal_the_dense_product(kind, size, N, K, M, dtype, with_bias) -> None:
    format, nbits, axis = kind
    bias = torch.randn(N, generator=torch.manual_seed(2)).to(dtype) if with_bias else None
    assert_linear(weight((N, K), nbits, SIZES[axis][size], axis, format=format), activations(M, K, dtype), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_are_taken_at_a_time(dtype: torch.dtype) -> None:
    assert_linear(weight((70, 520), 4, 32, 0), activations(600, 520, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [("int", 4, 0, 16), ("fp8", 8, 1, 64), ("int", 4, 1, 6)])
def test_scaled_strided_and_8_bit_activations(kind: tuple[str, int, int, int], dtype: torch.dtype) -> None:
    format, nbits, axis, size = kind
    q = weight((50, 200), nbits, size, axis, format=format).to(dtype)
    x = activations(200, 40, dtype).t()
    # Room for products of 16-bit activations and scales, which the plain path rounds.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for other in ({"act_pre_scale": torch.rand(200, generator=torch.manual_seed(3)) + 0.5}, {"activation": "int8"}):
        changed = q.with_data(**other)
        some = x[:15] if "activation" in other else x  # more with AMX: test_cpu_bytes.py
        with backend("reference"):
            want = F.linear(some.float(), changed.to(torch.float32))
        with backend("auto"):
            got = F.linear(some, changed).float()
        assert (got - want).abs().max() < tolerance * want.abs().max()


def same_with_nan(got: torch.Tensor, want: torch.Tensor) -> bool:
    finite = want.isfinite()
    close = (got[finite] - want[finite]).abs().max() < 1e-4 * want[finite].abs().max() if finite.any() else True
    return (
        bool(close)
        and torch.equal(got.nan_to_num(0, 1, -1)[~finite], want.nan_to_num(0, 1, -1)[~finite])
        and torch.equal(got.isnan(), want.isnan())
    )


WEIGHTS = [("int", 4, 0, 16), ("fp8", 8, 1, 64), ("fp6", 6, 0, 16), ("codebook rows", 4, 1, 64)]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nan_and_inf_reach_the_results_they_belong_to(kind: tuple[str, int, int, int]) -> None:
    format, nbits, axis, size = kind
    q = weight((48, 320), nbits, size, axis, format=format)
    x = activations(40, 320)
    for m, value in ((0, float("nan")), (7, float("inf")), (39, -float("inf"))):
        x[m, 5 * m] = value
    with backend("cpu"):
        assert same_with_nan(F.linear(x, q), x @ dense(q).T)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-18, 1e18, 1e30])
def test_many_tiny_and_huge_activations_come_through(kind: tuple[str, int, int, int], size: float) -> None:
    format, nbits, axis, group_size = kind
    x = activations(40, 320)
    x[3] *= size
    q = weight((48, 320), nbits, group_size, axis, format=format)
    with backend("cpu"):
        got = F.linear(x, q).double()
    want = x.double() @ dense(q).double().T
    # Row by row: a tiny one is measured against itself. Below 1e-37 products of float32 are not whole either.
    error = (got - want).abs().amax(1) / want.abs().amax(1)
    assert error.max() < (1e-5 if size > 1e-37 else 1e-4), error.max()


def codes_of_15(N: int, K: int, size: int, axis: int) -> HQQTensor:
    q = weight((N, K), 4, size, axis, scale_dtype=torch.float32)
    q.qdata.fill_(255)
    q.zero_point.zero_()
    return q


@pytest.mark.parametrize(("axis", "size"), [(0, 16), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_weights_make_infinite_results(axis: int, size: int, dtype: torch.dtype) -> None:
    # Ones: all of their parts but the first are zero, and Inf times zero is NaN. AVX2 multiplies zero points by scales.
    q, x = codes_of_15(64, 100, size, axis), torch.ones(20, 100)
    q.scale[2, 1] = float("inf")
    want = x @ dense(q).T
    with backend("cpu"):
        got = F.linear(x.to(dtype), q.to(dtype))
    assert want.isinf().any() and want.isfinite().any()
    assert torch.equal(got.isfinite(), want.isfinite())
    assert cpu.instruction_set() != "amx" or not got.isnan().any()


@pytest.mark.parametrize(("axis", "size"), [(0, 16), (1, 3)])
def test_sums_too_large_for_float32_are_infinite(axis: int, size: int) -> None:
    q, x = codes_of_15(64, 100, size, axis), activations(20, 100)
    x[4], x[5] = 3.3e38, -3.3e38
    with backend("cpu"):
        got = F.linear(x, q)
    assert (got[4] == float("inf")).all() and (got[5] == -float("inf")).all()
    torch.testing.assert_close(got[6:], x[6:] @ dense(q).T, atol=1e-3, rtol=1e-3)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("format", "nbits", "axis", "size"),
    [("int", 4, 1, 64), ("int", 4, 1, 20), ("int", 3, 1, 32), ("int", 4, 0, 64), ("nf4", 4, 1, 64), ("fp8", 8, 1, 32)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_many_bfloat16_rows_are_no_farther_off_than_dense_ones_and_exact_ones_less(
    format, nbits, axis, size, scaled
) -> None:
    q = weight((200, 520), nbits, size, axis, format=format)
    x = activations(70, 520, torch.bfloat16)
    if scaled:
        q = q.with_data(act_pre_scale=torch.rand(520, generator=torch.manual_seed(3)) + 0.5)
    exact = x.double() @ dense(q).double().T
    as_dense = relative_error(F.linear(x, dense(q).bfloat16()), exact)
    # Scaled activations are rounded as well, which a dense weight has multiplied in.
    assert relative_error(F.linear(x, q), exact) < (1.3 if scaled else 1.1) * as_dense
    sharp = relative_error(F.linear(x, q.with_data(activation="exact")), exact)
    assert sharp < 1.02 * relative_error(exact.bfloat16(), exact)
