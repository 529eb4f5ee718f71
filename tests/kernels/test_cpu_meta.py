"""The C++ kernels on scales and zero points of 8 and 4 bits against the plain path, within bounds that follow from the
dtypes, on every instruction set here (``test_cpu.py`` runs this file for each)."""

from typing import Any

import pytest
import torch
from bounds import BOUNDS, TABLE_BOUNDS, size_of_sums
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqtensor import backend, ops
from hqqtensor.formats import get_format
from hqqtensor.kernels import cpu
from hqqtensor.ops import PackedWeight, reference
from hqqtensor.packing import meta_bytes, pack, pack_meta

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

FORMATS = [*[("int", b) for b in range(1, 9)], ("fp4", 4), ("nf4", 4), ("fp6", 6), ("codebook", 2), ("codebook", 3)]
KINDS = [torch.float16, torch.bfloat16, torch.float32, 8, 4]
"""Of scales or zero points: a dtype, or the bits of codes."""


def dense_of(w: PackedWeight) -> Tensor:
    return reference.dequantize(w, torch.float32)


def scale_of(w: PackedWeight) -> Tensor | None:
    """That of each weight, of axis 0."""
    N = w.qdata.shape[-2]
    plain = reference.plain_meta(w)[0]
    return reference.expand_groups(plain, N, w.in_features, w.group_size, 0) if w.axis == 0 else None


def span_of(w: PackedWeight) -> Tensor:
    """Bounds of what is summed: zero points are taken out after the sum, tables are integers between their ends."""
    dense = dense_of(w).abs()
    scale, zero = reference.plain_meta(w)
    if w.format == "int":
        shift = scale * zero
    else:
        table = zero if w.format == "codebook" else get_format(w.format).levels(w.nbits).values
        shift = scale * table.abs().max()
    return 2 * (dense + reference.expand_groups(shift.abs(), *dense.shape[-2:], w.group_size, w.axis))


def packed(
    shape: tuple[int, ...], format: tuple[str, int], group_size: int, axis: int, scale: Any, zero: Any,
    own_rows: int = 1, wide: bool = False,
) -> PackedWeight:  # fmt: skip
    """Random codes, scales and zero points. ``wide``: rows of codes of scales have other bytes behind them."""
    name, nbits = format
    *stack, N, K = shape
    generator = torch.manual_seed(0)
    size = min(group_size, (N, K)[axis])
    rows, columns = (N, -(-K // size)) if axis == 1 else (-(-N // size), K)
    meta: list[Tensor] = []

    def values(kind: Any, low: float, high: float) -> Tensor:
        if isinstance(kind, torch.dtype):
            return (torch.rand(*stack, rows, columns, generator=generator) * (high - low) + low).to(kind)
        own = torch.rand(2, *stack, own_rows, columns, generator=generator)
        step = (high - low) / (2**kind - 1)
        meta.extend([(own[0] / 2 + 0.5) * step, -low / step + own[1]])
        codes = torch.randint(0, 2**kind, (*stack, rows, columns), generator=generator, dtype=torch.uint8)
        out = pack_meta(codes, kind)
        return torch.cat([out, out + 1], -1)[..., : out.shape[-1]] if wide else out

    qdata = pack(torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8), nbits)
    tensors = [qdata, values(scale, 0.1, 1.1), values(zero, 0.0, 2.0**nbits - 1) if name == "int" else None]
    if name == "codebook":
        tensors[2] = torch.randn(*stack, 1, 2**nbits, generator=generator).sort().values
    return PackedWeight(*tensors, meta, nbits, name, size, axis, K)


weights = {
    "format": st.sampled_from(FORMATS),
    "group_size": st.sampled_from([3, 4, 8, 12, 16, 20, 24, 32, 36, 64, 96, 100, 128, 192, 4096]),
    "axis": st.sampled_from([0, 1]),
    "scale": st.sampled_from(KINDS),
    "zero": st.sampled_from(KINDS),
    "own_rows": st.integers(1, 5),
    "wide": st.booleans(),
}
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
tokens = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33])


@settings(deadline=None, max_examples=examples(150))
@given(N=st.integers(1, 70), K=st.integers(1, 1200), M=tokens, dtype=dtypes, **weights)
def test_linear_equals_the_dense_product(N, K, M, dtype, **kwargs) -> None:
    w = packed((N, K), **kwargs)
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    with backend("cpu"):
        got = ops.linear(x, w)
    size = size_of_sums(x, span_of(w), scale_of(w))
    worst = ((got.double() - x.double() @ dense_of(w).double().T).abs() / size).max().item()
    assert worst <= (BOUNDS if kwargs["format"][0] == "int" else TABLE_BOUNDS)[dtype], worst


@settings(deadline=None, max_examples=examples(60))
@given(N=st.integers(1, 70), K=st.integers(1, 1200), M=tokens, dtype=dtypes, **weights)
def test_int8_activations_equal_the_plain_path(N, K, M, dtype, **kwargs) -> None:
    assume(M < 16 or kwargs["axis"] == 0 or cpu.instruction_set() != "amx")  # see test_cpu_bytes.py
    w = packed((N, K), **kwargs)
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    with backend("auto"):
        got = ops.linear(x, w, activation="int8")
    want = reference.linear(x, w, None, None, "int8")
    size = x.float().abs() @ span_of(w).T
    worst = ((got.float() - want.float()).abs() / size).max().item()
    bound = 2**-19 if kwargs["format"][0] == "int" else 2**-12
    assert worst <= bound + {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype], worst


@settings(deadline=None, max_examples=examples(100))
@given(N=st.integers(1, 40), K=st.integers(1, 4000), dtype=dtypes, **weights)
def test_dequantize_and_embedding_equal_the_plain_path_to_the_last_bit(N, K, dtype, **kwargs) -> None:
    w = packed((N, K), **kwargs)
    index = torch.randint(0, N, (2, 3), generator=torch.manual_seed(0))
    want = dense_of(w).to(dtype)
    with backend("cpu"):
        assert torch.equal(ops.dequantize(w, dtype), want)
        assert torch.equal(ops.embedding(index, w, dtype), want[index])


@settings(deadline=None, max_examples=examples(60))
@given(
    N=st.integers(1, 40), K=st.integers(8, 300), counts=st.lists(st.integers(0, 9), min_size=3, max_size=3), **weights
)
def test_experts_their_gradients_and_stacks_equal_the_plain_path(N, K, counts, **kwargs) -> None:
    w = packed((3, N, K), **kwargs)
    dense, span = dense_of(w), span_of(w)
    bound = TABLE_BOUNDS[torch.float32]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    generator = torch.manual_seed(1)
    runs = torch.randn(sum(counts), K, generator=generator, requires_grad=True)
    batch = torch.randn(3, 4, K, generator=generator, requires_grad=True)
    room = torch.zeros(3, N + 2, K + 1)
    with backend("cpu"):
        ops.dequantize_into(room[:, 1:-1, :K], w)
        grouped = ops.grouped_linear(runs, ends, w)
        batched = ops.batched_linear(batch, w)
    assert torch.equal(room[:, 1:-1, :K], dense)
    for x, got, own in ((runs, grouped, expert), (batch, batched, torch.arange(3))):
        rows, answers = (t if t.ndim == 3 else t.unsqueeze(1) for t in (x.detach(), got.detach()))
        want = rows.double() @ dense[own].double().mT
        assert ((answers - want).abs() <= bound * (rows.double().abs() @ span[own].double().mT)).all()
        grad = torch.randn_like(answers)
        found = torch.autograd.grad(got, x, grad.view_as(got))[0]
        torch.testing.assert_close(found, (grad @ dense[own]).view_as(x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["scale", "zero_point"])
@pytest.mark.parametrize("kind", [8, 4])
def test_rows_of_the_wrong_size_are_refused(axis: int, name: str, kind: int) -> None:
    w = packed((48, 300), ("int", 4), 4, axis, kind, kind)
    columns = 75 if axis == 1 else 300
    good = getattr(w, name)
    assert good.shape[-1] == meta_bytes(columns, kind)
    x, index = torch.randn(2, 300), torch.tensor([0])
    expected = (
        rf"{name} must be floating-point \[.*{columns}\], or uint8 \[.*{columns}\] or \[.*{meta_bytes(columns, 4)}\]"
    )
    short = good[:-1] if name == "zero_point" or axis == 1 else good[0]
    for bad in (good[:, :-1], torch.cat([good, good[:, :1]], -1), short):
        wrong = w._replace(**{name: bad})
        stack = wrong._replace(
            **{n: getattr(wrong, n).unsqueeze(0) for n in ("qdata", "scale", "zero_point")},
            meta=[m.unsqueeze(0) for m in w.meta],
        )
        for call in (
            lambda wrong=wrong: ops.linear(x, wrong),
            lambda wrong=wrong: ops.embedding(index, wrong, torch.float32),
            lambda stack=stack: ops.dequantize(stack, torch.float32),
        ):
            with backend("cpu"), pytest.raises(RuntimeError, match=expected):
                call()


def test_scales_of_scales_must_fit_and_be_there() -> None:
    w = packed((16, 256), ("int", 4), 16, 1, 4, 8)
    meta, x = w.meta, torch.randn(1, 256)
    for bad, message in (
        ([], "meta must begin with"),
        (meta[:2], "meta must begin with"),
        ([*meta, meta[0]], "meta must have 4 tensors"),
        ([m[:, :8] for m in meta], r"meta\[0\] must be floating-point \[1, 16\]"),
        ([m.int() for m in meta], r"meta\[0\] must be floating-point \[1, 16\]"),
        ([meta[0], meta[1].repeat(2, 1), *meta[2:]], "a scale and a zero point of one shape"),
        ([m[:0] for m in meta], r"meta\[0\] must be floating-point \[1, 16\] or with more rows"),
    ):
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            ops.linear(x, w._replace(meta=bad))
