"""8-bit activations of many tokens with AMX, for which weights become 8 bits too: against the exact product."""

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Exact, int8_bound
from test_cpu import weight

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None or cpu.instruction_set() != "amx", reason="no AMX here, or not asked for"
)
FORMATS = [*[("int", b) for b in range(1, 9)], ("fp4", 4), ("nf4", 4), ("codebook", 3), ("fp8", 8)]


def bound(q: HQQTensor, x: torch.Tensor) -> torch.Tensor:
    exact = Exact.of(q)
    sums = x.double().abs() @ exact.span.T
    return int8_bound(q, exact, x) + sums * (2**-20 + (2**-8 if x.dtype == torch.bfloat16 else 0))


@settings(deadline=None, max_examples=examples(80))
@given(
    format=st.sampled_from(FORMATS),
    group_size=st.sampled_from([4, 8, 12, 16, 20, 32, 48, 64, 100, 128, 192, None]),
    N=st.integers(1, 140),
    K=st.integers(1, 1300),
    M=st.sampled_from([16, 17, 31, 33, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    outliers=st.booleans(),
)
def test_products_are_within_the_rounding_of_both_sides(format, group_size, N, K, M, dtype, outliers) -> None:
    name, nbits = format
    q = weight((N, K), nbits, group_size, 1, format=name).to(dtype).with_data(activation="int8")
    x = torch.randn(M, K, generator=torch.manual_seed(1))
    if outliers:
        x[:, torch.randint(K, (5,), generator=torch.manual_seed(2))] *= 100
    x = x.to(dtype)
    error = (F.linear(x, q).double() - x.double() @ Exact.of(q).weight.T).abs()
    assert (error / (bound(q, x) + 1e-30)).max() <= 1


def test_large_features_do_not_leave_the_others_few_steps() -> None:
    torch.manual_seed(0)
    q = HQQTensor.from_hp(torch.randn(64, 2048), HqqConfig(4, 64, activation="int8"))
    x = torch.randn(40, 2048)
    x[:, 100::512] *= 50
    want = F.linear(x, q.dequantize())
    # Steps of the largest feature alone would be 50 times as long: an error of some 5 %.
    assert (F.linear(x, q) - want).norm() < 0.01 * want.norm()


def test_zeros_have_a_product_of_zero() -> None:
    q = weight((40, 576), 4, 32, 1).with_data(activation="int8")
    x = torch.zeros(20, 576)
    x[3, 5] = 1
    got = F.linear(x, q)
    assert not got[:3].any() and not got[4:].any() and got[3].any()


@pytest.mark.parametrize("size", [1e-35, 1e30])
def test_numbers_of_every_size_are_served(size: float) -> None:
    q = weight((40, 576), 4, 64, 1).with_data(activation="int8")
    x = torch.randn(20, 576, generator=torch.manual_seed(0)) * size
    error = (F.linear(x, q).double() - x.double() @ Exact.of(q).weight.T).abs()
    assert (error / (bound(q, x) + 1e-44)).max() <= 1


def test_rows_with_scales_that_are_not_finite_or_tiny_are_exact_all_the_same() -> None:
    q = weight((40, 576), 4, 64, 1).with_data(activation="int8")
    scale = q.scale.clone()
    scale[3, 2], scale[5], scale[7] = torch.inf, 1e-38, 0
    q = q.with_data(scale=scale)
    x = torch.randn(20, 576, generator=torch.manual_seed(0))
    got, want = F.linear(x, q), F.linear(x, q.dequantize())
    assert not got[:, 3].isfinite().any()
    assert torch.allclose(got[:, 5], want[:, 5], rtol=0.05, atol=0) and not got[:, 7].any()
    others = [i for i in range(40) if i not in (3, 5, 7)]
    assert (got[:, others] - want[:, others]).norm() < 0.02 * want[:, others].norm()


def test_an_entry_of_a_codebook_that_is_nan_stays_nan() -> None:
    q = weight((40, 576), 3, 64, 1, format="codebook").with_data(activation="int8")
    table = q.zero_point.clone()
    table[0, 5] = torch.nan
    q = q.with_data(zero_point=table)
    got = F.linear(torch.ones(20, 576), q)
    assert torch.equal(got.isnan(), q.dequantize().isnan().any(1).expand(20, 40)) and got.isnan().any()
