"""The C++ kernels against the plain path, within bounds that follow from the dtypes, on every instruction set here."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.kernels import cpu
from hqqtensor.ops.reference import expand_groups
from hqqtensor.packing import pack

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

# Of sum |x| |w|: rounding of the result in its dtype, plus fixed-point activations and float32 sums.
BOUNDS = {torch.float32: 2**-21, torch.bfloat16: 2**-8 + 2**-14, torch.float16: 2**-11 + 2**-14}


def weight(
    shape: tuple[int, int], nbits: int, group_size: int | None, axis: int, scale_dtype: torch.dtype = torch.float16
) -> HQQTensor:
    """Random codes, scales and zero points: every code occurs, zero points lie in the range of codes."""
    generator = torch.manual_seed(0)
    N, K = shape
    extent = K if axis == 1 else N
    size = min(group_size or extent, extent)
    groups = -(-extent // size)
    meta = (N, groups) if axis == 1 else (groups, K)
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(meta, generator=generator) + 0.1).to(scale_dtype)
    zero = (torch.rand(meta, generator=generator) * (2**nbits - 1)).to(scale_dtype)
    return HQQTensor(pack(codes, nbits), scale, zero, nbits, size, axis, torch.Size(shape), torch.float32)


def dense(q: HQQTensor) -> torch.Tensor:
    with backend("dequantize"):
        return q.dequantize(torch.float32)


def assert_linear(q: HQQTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    d = dense(q).double()
    # The zero point is taken out after the sum, so the size of what is summed is |x| times the span of the weights.
    span = (d.abs() + expand_groups((q.zero_point * q.scale).double().abs(), *d.shape, q.group_size, q.axis)) * 2
    want = x.double() @ d.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ span.T + (0 if bias is None else bias.double().abs())
    with backend("cpu"):
        got = F.linear(x, q.to(x.dtype), bias)
    assert got.dtype == x.dtype and got.shape == want.shape
    worst = ((got.double() - want).abs() / size.clamp(min=1e-40)).max().item()
    assert worst <= BOUNDS[x.dtype], worst


@settings(deadline=None, max_examples=150)
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([4, 8, 16, 24, 32, 64, 100, 128, 192, 256, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 70),
    K=st.integers(1, 600),
    M=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
)
def test_linear_equals_the_dense_product(nbits, group_size, axis, N, K, M, dtype, scale_dtype, with_bias) -> None:
    q = weight((N, K), nbits, group_size, axis, scale_dtype)
    generator = torch.manual_seed(1)
    x = torch.randn(M, K, generator=generator).to(dtype)
    assert_linear(q, x, torch.randn(N, generator=generator).to(dtype) if with_bias else None)


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_extreme_codes_and_activations_do_not_overflow(nbits: int, axis: int) -> None:
    q = weight((16, 512), nbits, 16 if axis == 0 else 64, axis)
    for fill in (0, 255):
        q.qdata.fill_(fill)
        for sign in (1, -1):
            assert_linear(q, torch.full((1, 512), sign * 3.0))
            assert_linear(q, torch.full((3, 512), sign * 1e20))


@pytest.mark.parametrize("axis", [0, 1])
def test_activations_of_any_size_come_through(axis: int) -> None:
    q = weight((32, 256), 4, 32, axis)
    x = torch.randn(3, 256, generator=torch.manual_seed(2))
    for size in (1e-36, 1e-30, 1e-10, 1e10, 1e30):
        assert_linear(q, x * size)
    mixed = x.clone()
    mixed[:, ::64] *= 1e4
    assert_linear(q, mixed)
    assert_linear(q, torch.zeros(2, 256))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_hidden(axis: int, bad: float) -> None:
    q = weight((32, 256), 4, 32, axis)
    x = torch.ones(2, 256)
    x[0, 7] = bad
    with backend("cpu"):
        y = F.linear(x, q)
    assert not y[0].isfinite().any() and y[1].isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([3, 8, 24, 64, 128, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 40),
    K=st.integers(1, 2500),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_dequantize_and_embedding_equal_the_plain_path_to_the_last_bit(nbits, group_size, axis, N, K, dtype) -> None:
    q = weight((N, K), nbits, group_size, axis)
    index = torch.randint(0, N, (2, 3), generator=torch.manual_seed(0))
    with backend("dequantize"):
        want = q.dequantize(dtype)
    with backend("cpu"):
        assert torch.equal(q.dequantize(dtype), want)
        assert torch.equal(F.embedding(index, q.to(dtype)), want[index])


def test_experts_equal_their_dense_products() -> None:
    w = torch.randn(3, 48, 200, generator=torch.manual_seed(0))
    q = HQQTensor.from_hp(w, HqqConfig(4, 32))
    x = torch.randn(3, 5, 200)
    with backend("cpu"):
        got = torch.bmm(x, q.transpose(1, 2))
    torch.testing.assert_close(got, torch.bmm(x, dense(q).transpose(1, 2)), atol=1e-4, rtol=1e-4)


def test_slices_of_rows_and_columns_run_in_place() -> None:
    q = weight((64, 512), 4, 64, 1)
    x = torch.randn(2, 512)
    with backend("cpu"):
        got = F.linear(x[:, 128:384], q[8:40, 128:384])
    torch.testing.assert_close(got, x[:, 128:384] @ dense(q)[8:40, 128:384].T, atol=1e-4, rtol=1e-4)


def test_activation_scale_and_strided_inputs() -> None:
    q = weight((32, 128), 4, 64, 1)
    scaled = q.with_data(act_pre_scale=torch.rand(128) + 0.5)
    x = torch.randn(128, 6).t()
    with backend("cpu"):
        got = F.linear(x, scaled)
    torch.testing.assert_close(got, (x * scaled.act_pre_scale) @ dense(q).T, atol=1e-4, rtol=1e-4)


def test_indices_outside_raise_and_shapes_that_lie_are_refused() -> None:
    q = weight((16, 128), 4, 64, 1)
    for index in (-1, 16):
        with pytest.raises(IndexError, match="is not in 0 to 15"):
            F.embedding(torch.tensor([index]), q)
    x = torch.randn(1, 128)
    for change in (
        {"qdata": q.qdata[:, :-1]},
        {"qdata": q.qdata[:-1]},
        {"scale": q.scale[:, :1]},
        {"zero_point": q.zero_point[:-1]},
        {"nbits": 8},
    ):
        with backend("cpu"), pytest.raises(RuntimeError, match=r"qdata must be|scale"):
            F.linear(x, q.with_data(**change))


def test_threads_of_the_caller_do_not_disturb_each_other() -> None:
    q = weight((256, 1024), 3, 64, 1)
    xs = [torch.randn(m, 1024, generator=torch.manual_seed(m)) for m in (1, 2, 3, 4, 8, 20)]
    want = [F.linear(x, q) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(F.linear(xs[i], q), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    q = weight((300, 1024), 4, 64, 1)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([F.linear(torch.randn(m, 1024, generator=torch.manual_seed(0)), q) for m in (1, 5, 40)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set_of_this_machine(name: str) -> None:
    if os.environ.get("HQQTENSOR_CPU"):
        pytest.skip("this is the run that a parent started")
    env = {**os.environ, "HQQTENSOR_CPU": name}
    code = "from hqqtensor.kernels import cpu; print(cpu.instruction_set())"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if found.returncode:
        assert "but this processor lacks it" in found.stderr
        pytest.skip(f"no {name} on this processor")
    assert found.stdout.split()[-1] == name
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(tests, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from hqqtensor.kernels import cpu; cpu.instruction_set()"
    env = {**os.environ, "HQQTENSOR_CPU": "sse9"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.returncode != 0 and "must be avx512, avx2 or portable, got 'sse9'" in found.stderr
