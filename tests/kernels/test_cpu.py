"""The C++ kernels against the plain path, within bounds that follow from the dtypes, on every instruction set here."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bounds import BOUNDS, TABLE_BOUNDS, size_of_sums
from examples import examples
from fresh_python import run_fresh
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from in_threads import wrong_results

from hqqtensor import HqqConfig, HQQTensor, backend, ops
from hqqtensor.formats import get_format
from hqqtensor.kernels import cpu
from hqqtensor.ops.reference import expand_groups
from hqqtensor.packing import pack

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


def weight(
    shape: tuple[int, int],
    nbits: int,
    group_size: int | None,
    axis: int,
    scale_dtype: torch.dtype = torch.float16,
    format: str = "int",
    seed: int = 0,
) -> HQQTensor:
    """Random codes and scales, zero points within the range of codes: every code occurs (but NaN)."""
    generator = torch.manual_seed(seed)
    N, K = shape
    extent = K if axis == 1 else N
    size = min(group_size or extent, extent)
    groups = -(-extent // size)
    meta = (N, groups) if axis == 1 else (groups, K)
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    if format == "fp8":
        codes[codes & 127 == 127] = 0
    scale = (torch.rand(meta, generator=generator) + 0.1).to(scale_dtype)
    zero = None
    if format == "int":
        zero = (torch.rand(meta, generator=generator) * (2**nbits - 1)).to(scale_dtype)
    elif format == "codebook":
        zero = torch.randn(1, 2**nbits, generator=generator).sort().values
    elif format == "codebook rows":
        zero = torch.randn(N, 2**nbits, generator=generator).sort().values
    settings = (nbits, size, axis, torch.Size(shape), torch.float32, format.removesuffix(" rows"))
    return HQQTensor(pack(codes, nbits), scale, *settings, zero_point=zero)


def dense(q: HQQTensor) -> torch.Tensor:
    with backend("reference"):
        return q.dequantize(torch.float32)


def assert_linear(q: HQQTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    d = dense(q).double()
    # The zero point is taken out after the sum, so the size of what is summed is |x| times the span of the weights.
    # Tables become integers between their ends: there it is the scale times the largest value.
    if q.format == "int":
        shift = (q.zero_point * q.scale).double()
    else:
        table = q.zero_point.float() if q.format == "codebook" else get_format(q.format).levels(q.nbits).values
        shift = (q.scale * table.abs().max()).double()
    span = (d.abs() + expand_groups(shift.abs(), *d.shape, q.group_size, q.axis)) * 2
    want = x.double() @ d.T + (0 if bias is None else bias.double())
    scale = expand_groups(q.scale, *d.shape, q.group_size, 0) if q.axis == 0 else None
    size = size_of_sums(x, span, scale) + (0 if bias is None else bias.double().abs())
    with backend("cpu"):
        got = F.linear(x, q.to(x.dtype), bias)
    assert got.dtype == x.dtype and got.shape == want.shape
    worst = ((got.double() - want).abs() / size.clamp(min=1e-40)).max().item()
    assert worst <= (BOUNDS if q.format == "int" else TABLE_BOUNDS)[x.dtype], worst


@settings(deadline=None, max_examples=examples(100))
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([4, 8, 16, 20, 24, 32, 64, 100, 128, 192, 256, None]),
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


FORMATS = [
    ("fp4", 4),
    ("nf4", 4),
    ("fp6", 6),
    ("fp8", 8),
    *[("codebook", b) for b in (1, 2, 3, 4)],
    ("codebook rows", 4),
]


@settings(deadline=None, max_examples=examples(60))
@given(
    format=st.sampled_from(FORMATS),
    group_size=st.sampled_from([3, 8, 32, 64, 100, 128, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 70),
    K=st.integers(1, 600),
    M=st.sampled_from([1, 2, 4, 5, 17, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_format_equals_the_dense_product(format, group_size, axis, N, K, M, dtype) -> None:
    name, nbits = format
    if name == "codebook rows" and axis == 0:
        axis = 1
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    assert_linear(weight((N, K), nbits, group_size, axis, format=name), x)


@settings(deadline=None, max_examples=examples(40))
@given(
    format=st.sampled_from([*[("int", b) for b in range(1, 9)], ("fp4", 4), ("nf4", 4), ("codebook", 3)]),
    group_size=st.sampled_from([16, 20, 32, 64, 100, 128, None]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 70),
    K=st.integers(1, 600),
    M=st.sampled_from([1, 2, 4, 5, 17, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(format=("int", 6), group_size=16, axis=0, N=57, K=1, M=1, dtype=torch.float32)
def test_int8_activations_equal_the_plain_path(format, group_size, axis, N, K, M, dtype) -> None:
    assume(M < 16 or axis == 0 or cpu.instruction_set() != "amx")  # see test_cpu_bytes.py
    name, nbits = format
    q = weight((N, K), nbits, group_size, axis, format=name).to(dtype).with_data(activation="int8")
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    # With axis 0, where no integer kernel serves, the plain path takes over.
    with backend("cpu" if axis == 1 or cpu.instruction_set() != "portable" else "auto"):
        got = F.linear(x, q).float()
    with backend("reference"):
        want = F.linear(x, q).float()
    # Sums of codes and of zero points are rounded before their difference is taken.
    zeros = dense(q.with_data(qdata=torch.zeros_like(q.qdata))).abs() if name == "int" else 0
    size = x.float().abs() @ (dense(q).abs() + zeros + 1).T
    # Activations are rounded alike; then float32 sums, the table's 14 bits and the result's dtype remain.
    bound = 2**-12 if name in ("nf4", "codebook") else 2**-19
    worst = ((got - want).abs() / size.clamp(min=1e-30)).max().item()
    assert worst <= bound + (2**-7 if dtype == torch.bfloat16 else 0), worst


def test_groups_without_rows_take_no_time() -> None:
    q = weight((2, 16), 4, 64, 0)
    whole = ops.PackedWeight(q.qdata, q.scale, q.zero_point, None, 4, "int", 64, 0, 16)
    scale, zero = (t[:1].expand(2**50, 16) for t in (q.scale, q.zero_point))
    x = torch.randn(3, 16, generator=torch.manual_seed(0))
    for activation in ("float", "int8"):
        got = ops.linear(x, whole._replace(scale=scale, zero_point=zero), activation=activation)
        assert torch.equal(got, ops.linear(x, whole, activation=activation))


def test_int8_activations_of_nan_and_inf_are_not_hidden() -> None:
    q = weight((32, 256), 4, 64, 1).with_data(activation="int8")
    x = torch.ones(2, 256)
    x[0, 7] = float("nan")
    y = F.linear(x, q)
    assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_lower_float32_precision_is_taken_as_an_offer(precision: str) -> None:
    q, x = weight((64, 512), 4, 64, 1), torch.randn(5, 512, generator=torch.manual_seed(0))
    want = x.double() @ dense(q).double().T
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        error = ((F.linear(x, q) - want).abs().max() / want.abs().max()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error < (1e-6 if precision == "highest" else 1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("quant_scale", "quant_zero"), [(True, True), (True, False), (False, True)])
def test_quantized_scales_and_zero_points_are_read_in_place(axis: int, quant_scale: bool, quant_zero: bool) -> None:
    w = torch.randn(300, 520, generator=torch.manual_seed(0))
    config = HqqConfig(4, 16, axis=axis, quant_scale=quant_scale, quant_zero=quant_zero)
    q = HQQTensor.from_hp(w, config)
    for M in (1, 6, 40):
        x = torch.randn(M, 520, generator=torch.manual_seed(M))
        want = x.double() @ dense(q).double().T
        with backend("cpu"):
            got = F.linear(x, q)
            index = torch.tensor([0, 299, 7])
            assert torch.equal(F.embedding(index, q), dense(q)[index])
            assert torch.equal(q.dequantize(), dense(q))
        assert (got - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("nbits", "group_size", "K"), [(4, 20, 256), (4, 20, 2100), (3, 20, 256), (2, 16, 256), (4, 32, 96)]
)
def test_what_scratch_memory_held_before_never_gets_into_a_result(nbits: int, group_size: int, K: int) -> None:
    config = HqqConfig(nbits, group_size, quant_scale=True, quant_zero=True, meta_nbits=4)
    q = HQQTensor.from_hp(torch.randn(70, K, generator=torch.manual_seed(0)), config)
    x = torch.randn(1, K, generator=torch.manual_seed(1))
    large, minus_one = weight((70, 16384), 4, 64, 1), torch.full((4, 16384), -1 / 32512)
    minus_one[:, ::64] = 1
    for _ in range(3):
        F.linear(minus_one.bfloat16(), large)  # whose activations leave bytes of 0xFF behind: NaN as floats
        error = (F.linear(x, q) - x @ dense(q).T).abs().max()
        assert error < 1e-4 * K**0.5
        assert F.linear(x.bfloat16(), q.to(torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("K", [24, 40, 100, 128, 192, 300, 320, 452, 576, 640, 648, 767, 1536, 2100])
def test_groups_of_20_equal_the_dense_product_wherever_a_row_ends(K: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q = weight((70, K), 4, 20, 1, torch.float16)
        assert_linear(q, torch.randn(2, K, generator=torch.manual_seed(K)).to(dtype))
        assert_linear(q[5:], torch.randn(1, K, generator=torch.manual_seed(1)).to(dtype))
        assert_linear(q, torch.zeros(1, K, dtype=dtype))


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("axis", "group_size"), [(0, 16), (1, 64), (1, 20)])
def test_extreme_codes_and_activations_do_not_overflow(nbits: int, axis: int, group_size: int) -> None:
    q = weight((16, 512), nbits, group_size, axis)
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


@settings(deadline=None, max_examples=examples(60))
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
    with backend("reference"):
        want = q.dequantize(dtype)
    with backend("cpu"):
        assert torch.equal(q.dequantize(dtype), want)
        assert torch.equal(F.embedding(index, q.to(dtype)), want[index])


@settings(deadline=None, max_examples=examples(100))
@given(
    format=st.sampled_from([*[("int", b) for b in range(1, 9)], ("nf4", 4), ("codebook", 2)]),
    group_size=st.sampled_from([8, 24, 32, 64, None]),
    axis=st.sampled_from([0, 1]),
    E=st.integers(1, 3),
    N=st.integers(1, 130),
    K=st.sampled_from([8, 20, 32, 64, 80, 96, 128, 160, 192, 256, 1100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    quantized_scales=st.booleans(),
)
def test_stacks_of_short_rows_are_made_dense_in_place_to_the_last_bit(
    format, group_size, axis, E, N, K, dtype, quantized_scales
) -> None:
    name, nbits = format
    if quantized_scales and name == "int":
        w = torch.randn(2, E, N, K, generator=torch.manual_seed(0))
        size = group_size and min(group_size, (N, K)[axis])
        q = HQQTensor.from_hp(w, HqqConfig(nbits, size, axis=axis, solver="rtn", quant_scale=True, quant_zero=True))
    else:
        parts = [weight((N, K), nbits, group_size, axis, format=name, seed=seed) for seed in range(2 * E)]
        stack = [torch.stack([getattr(p, n) for p in parts]).unflatten(0, (2, E)) for n in ("qdata", "scale")]
        zero = parts[0].zero_point
        zero = zero if zero is None else torch.stack([p.zero_point for p in parts]).unflatten(0, (2, E))
        q = parts[0].with_data(qdata=stack[0], scale=stack[1], zero_point=zero, shape=torch.Size((2, E, N, K)))
    with backend("reference"):
        want = q.dequantize(dtype)
    with backend("cpu"):
        assert torch.equal(q.dequantize(dtype), want)
    for choice in ("cpu", "reference"):
        # Between rows that belong to somebody else, experts outermost.
        room = torch.zeros(E, 2, N + 3, K + 5, dtype=dtype)
        with backend(choice):
            ops.dequantize_into(room.transpose(0, 1)[:, :, 1:-2, :K], q.operand())
        assert torch.equal(room[:, :, 1:-2, :K].transpose(0, 1), want)
        assert not room[:, :, :1].any() and not room[:, :, -2:].any() and not room[..., K:].any()


def test_dense_numbers_go_only_where_they_fit() -> None:
    q = weight((16, 64), 4, 32, 1)
    for out in (torch.empty(16, 63), torch.empty(1, 16, 64), torch.empty(64, 16).t()):
        with backend("cpu"), pytest.raises(RuntimeError, match=r"out must be \[16, 64\]"):
            ops.dequantize_into(out, q.operand())
    torch.library.opcheck(torch.ops.hqqtensor.dequantize_into.default, (torch.empty(16, 64), *q.operand()))


def test_experts_equal_their_dense_products() -> None:
    w = torch.randn(3, 48, 200, generator=torch.manual_seed(0))
    q = HQQTensor.from_hp(w, HqqConfig(4, 32))
    x = torch.randn(3, 5, 200)
    with backend("cpu"):
        got = torch.bmm(x, q.transpose(1, 2))
    torch.testing.assert_close(got, torch.bmm(x, dense(q).transpose(1, 2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["int", "nf4", "codebook"])
def test_experts_in_runs_equal_their_dense_products(format: str) -> None:
    w = torch.randn(4, 48, 200, generator=torch.manual_seed(0))
    q = HQQTensor.from_hp(w, HqqConfig(4, 32, format=format, quant_scale=format == "int"))
    x = torch.randn(12, 200, requires_grad=True)
    ends = torch.tensor([3, 3, 9, 11], dtype=torch.int32)  # the second expert gets nothing, the last row is nobody's
    plain = dense(q)
    want = torch.cat([x[:3] @ plain[0].T, x[3:9] @ plain[2].T, x[9:11] @ plain[3].T, torch.zeros(1, 48)])
    with backend("cpu"):
        got = F.grouped_mm(x, q.transpose(1, 2), offs=ends)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grad = torch.autograd.grad(got.square().sum(), x)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), x)[0], atol=1e-2, rtol=1e-3)
    for bad in ([3, 2, 9, 11], [3, 3, 9, 13]):
        with backend("cpu"), pytest.raises(RuntimeError, match="offsets must rise"):
            F.grouped_mm(x, q.transpose(1, 2), offs=torch.tensor(bad, dtype=torch.int32))


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
        {"format": "codebook"},
        {"qdata": q.qdata[:-1]},
        {"scale": q.scale[:, :1]},
        {"zero_point": q.zero_point[:-1]},
        {"nbits": 8},
    ):
        with (
            backend("cpu"),
            pytest.raises(RuntimeError, match=r"(qdata|scale|zero_point|codebook) must be"),
        ):
            ops.linear(x, q.operand()._replace(**change))


def test_threads_of_the_caller_do_not_disturb_each_other() -> None:
    q = weight((256, 1024), 3, 64, 1)
    xs = [torch.randn(m, 1024, generator=torch.manual_seed(m)) for m in (1, 2, 3, 4, 8, 20)]
    want = [F.linear(x, q) for x in xs]
    calls = [lambda x=x: F.linear(x, q) for x in xs]
    assert not wrong_results(calls, want, rounds=50)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amx", "avx512", "avx2", "portable"])
def test_every_instruction_set_of_this_machine(name: str) -> None:
    if os.environ.get("HQQTENSOR_CPU"):
        pytest.skip("this is the run that a parent started")
    if name == cpu.instruction_set():
        pytest.skip("the tests here run on it")
    folder = Path(__file__).parent
    files = [str(path) for path in (*sorted(folder.glob("test_cpu*.py")), folder / "test_linear_many.py")]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = run_fresh(code, "-q", "-x", "-p", "no:cacheprovider", *files, HQQTENSOR_CPU=name)
    if "but this processor lacks it" in result.stdout:
        pytest.skip(f"no {name} on this processor")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


def test_the_instruction_set_that_is_asked_for_is_the_one_in_use() -> None:
    assert cpu.instruction_set() == (os.environ.get("HQQTENSOR_CPU") or cpu.instruction_set())


alike = pytest.mark.skipif(
    bool(os.environ.get("HQQTENSOR_CPU")), reason="alike on every instruction set: runs without HQQTENSOR_CPU"
)


@alike
def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from hqqtensor.kernels import cpu; cpu.instruction_set()"
    found = run_fresh(code, HQQTENSOR_CPU="sse9")
    assert found.returncode != 0 and "must be amx, avx512, avx2 or portable, got 'sse9'" in found.stderr


@alike
def test_without_the_library_the_plain_path_works_and_says_so_once() -> None:
    code = """
import sys, warnings
import torch

def missing(path):
    raise OSError(f"{path}: no such file")

torch.ops.load_library = missing
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from hqqtensor import HQQTensor, HqqConfig
    from hqqtensor.cli.env import collect
    q = HQQTensor.from_hp(torch.randn(16, 64), HqqConfig(4, 32))
    x = torch.randn(3, 64, requires_grad=True)
    for _ in range(2):
        y = torch.nn.functional.linear(x, q)
    y.sum().backward()
    e = HQQTensor.from_hp(torch.randn(2, 16, 64), HqqConfig(4, 4, quant_scale=True))
    x3 = torch.randn(2, 3, 64, requires_grad=True)
    torch.bmm(x3, e.transpose(1, 2)).sum().backward()
    torch.testing.assert_close(x3.grad, e.dequantize().sum(1, keepdim=True).expand(2, 3, -1))
    x2 = torch.randn(5, 64, requires_grad=True)
    torch._grouped_mm(x2, e.transpose(1, 2), offs=torch.tensor([2, 5], dtype=torch.int32)).sum().backward()
    torch.testing.assert_close(x2.grad[2:], e.dequantize()[1].sum(0).expand(3, -1))
torch.testing.assert_close(y, x @ q.dequantize().t())
torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, -1))
assert sum("plain path" in str(w.message) for w in seen) == 1
assert "compiled library is not there" in next(b for b in collect()["backends"] if b["name"] == "cpu")["reason"]
print("fine")
"""
    found = run_fresh(code)
    assert found.stdout.strip().endswith("fine"), found.stderr[-2000:]


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("format", "nbits"), [("int", 2), ("int", 4), ("int", 8), ("nf4", 4), ("fp8", 8)])
def test_numbers_near_float32s_limit_stay_finite_up_to_the_documented_one(
    format: str, nbits: int, axis: int, activation: str
) -> None:
    """As docs/tensor.md has it: sums of in_features products of the largest numbers stay below 2**126."""
    N, K = 32, 256
    q = weight((N, K), nbits, 64, axis, torch.float32, format)
    table = q.zero_point + 2**nbits if format == "int" else get_format(format).table.nan_to_num()
    largest = table.abs().max().item()
    for M in (1, 5, 40):
        x = torch.rand(M, K, generator=torch.manual_seed(M)) * 2 - 1
        for exponent in (-100, -60, 0, 60, 100, 120):  # of x; scales take the rest
            scale = 2.0 ** (125.9 - exponent) / (largest * K * q.scale.max().item())
            if scale * q.scale.max().item() > 2.0**127:
                continue
            big = q.with_data(scale=q.scale * scale, activation=activation)
            with backend("cpu" if axis == 1 or activation == "float" else "auto"):
                got = F.linear(x * 2.0**exponent, big)
            want = (x * 2.0**exponent).double() @ dense(big).double().T
            assert got.isfinite().all()
            bound = 0.02 if activation == "int8" else 1e-4
            assert ((got - want).abs().max() / want.abs().max()).item() < bound
