"""The C++ solvers and packing against the plain ones."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.kernels import cpu
from hqqtensor.transforms.column_scale import column_spread

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


def both(w: torch.Tensor, config: HqqConfig) -> tuple[HQQTensor, HQQTensor]:
    with backend("cpu"):
        fast = HQQTensor.from_hp(w, config)
    with backend("reference"):
        return fast, HQQTensor.from_hp(w, config)


@settings(deadline=None, max_examples=examples(80))
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([2, 7, 16, 20, 64, 100, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 150),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 0.02, 30.0]),
)
def test_rtn_and_packing_equal_the_plain_ones_to_the_last_bit(nbits, group_size, axis, N, K, dtype, size) -> None:
    w = (torch.randn(N, K, generator=torch.manual_seed(0)) * size).to(dtype)
    extent = K if axis == 1 else N
    chosen = None if group_size is None else min(group_size, extent)
    fast, plain = both(w, HqqConfig(nbits, chosen, axis=axis, solver="rtn"))
    assert torch.equal(fast.scale, plain.scale) and torch.equal(fast.zero_point, plain.zero_point)
    assert torch.equal(fast.qdata, plain.qdata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 8), (3, 5), (100, 64), (333, 77), (70, 300)])
def test_column_spread_is_the_plain_one_up_to_rounding(N, K, dtype) -> None:
    generator = torch.manual_seed(0)
    w = (torch.randn(N, K, generator=generator) * torch.rand(K, generator=generator)).to(dtype)
    w[:, 0], w[N // 2] = 0, 0
    for matrix in (w, w.float() * 1e-38):
        torch.testing.assert_close(cpu.OPS._column_spread(matrix, 8), column_spread(matrix, 8), rtol=1e-5, atol=0)


def test_column_spread_does_not_depend_on_the_number_of_threads() -> None:
    w, before = torch.randn(301, 200, generator=torch.manual_seed(0)), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(cpu.OPS._column_spread(w, 8))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


GROUPS = [(64, 1), (64, 0), (24, 1), (None, 1), (16, 0)]


@pytest.mark.parametrize(
    ("nbits", "group_size", "axis", "dtype"),  # every pair of values
    [(n, *GROUPS[i], (torch.float32, torch.bfloat16)[(n + i) % 2]) for n in range(1, 9) for i in range(5)],
)
def test_joint_is_as_good_as_the_plain_one(nbits, group_size, axis, dtype) -> None:
    w = (torch.randn(300, 300, generator=torch.manual_seed(0)) * 0.02).to(dtype)
    fast, plain = both(w, HqqConfig(nbits, group_size, axis=axis))
    errors = [(q.dequantize(torch.float32) - w.float()).square().sum().item() for q in (fast, plain)]
    assert errors[0] <= 1.003 * errors[1]


def test_constant_tiny_and_far_off_groups() -> None:
    w = torch.zeros(6, 64)
    w[1], w[2], w[3] = 0.5, -3.0, 1e-38
    w[4] = torch.randn(64) * 1e-6
    w[5] = 100 + torch.randn(64) * 0.1
    for solver in ("rtn", "hqq_joint"):
        fast, _ = both(w, HqqConfig(8, 64, solver=solver))
        d = fast.dequantize()
        assert torch.equal(d[:3], w[:3])
        for row in (4, 5):
            spread = (w[row] - w[row].mean()).square().sum()
            assert (d[row] - w[row]).square().sum() / spread < 1e-3


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    w = torch.randn(130, 330, generator=torch.manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            configs = [HqqConfig(3, 32, axis=axis, solver=solver) for axis in (0, 1) for solver in ("hqq_joint", "hqq")]
            found.append([HQQTensor.from_hp(w, config) for config in configs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_norms_take_the_plain_path() -> None:
    fast, plain = both(torch.randn(16, 64, generator=torch.manual_seed(0)), HqqConfig(4, 64, lp_norm=0.7))
    assert torch.equal(fast, plain)


@settings(deadline=None, max_examples=examples(40))
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([7, 16, 64, 100, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 150),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1e-6, 0.02, 3.0]),
)
def test_the_published_solver_equals_the_plain_one_up_to_rounding(nbits, group_size, axis, N, K, dtype, size) -> None:
    w = (torch.randn(N, K, generator=torch.manual_seed(0)) * size).to(dtype)
    extent = K if axis == 1 else N
    chosen = None if group_size is None else min(group_size, extent)
    fast, plain = both(w, HqqConfig(nbits, chosen, axis=axis, solver="hqq", scale_dtype=torch.float32))
    assert torch.equal(fast.scale, plain.scale)
    # Sums are taken in another order, so zero points differ in their last bits, and now and then a code at a tie moves
    # that of its group.
    far = (fast.zero_point - plain.zero_point).abs() > 1e-3 + 1e-5 * plain.zero_point.abs()
    assert far.sum() <= max(4, 0.05 * far.numel())
    errors = [(q.dequantize(torch.float32) - w.float()).abs().sum().item() for q in (fast, plain)]
    assert abs(errors[0] - errors[1]) <= 0.02 * errors[1] + 1e-12
