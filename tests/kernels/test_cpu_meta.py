"""The C++ kernels on scales and zero points of 8 and 4 bits against the plain path, within bounds that follow from the
dtypes, on every instruction set here (``test_cpu.py`` runs this file for each)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bounds import BOUNDS, TABLE_BOUNDS, size_of_sums
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqtensor import backend, ops
from hqqtensor.formats import get_format
from hqqtensor.kernels import cpu
from hqqtensor.ops import reference
from hqqtensor.packing import meta_bytes, pack, pack_meta

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

FORMATS = [*[("int", b) for b in range(1, 9)], ("fp4", 4), ("nf4", 4), ("fp6", 6), ("codebook", 2), ("codebook", 3)]
KINDS = [torch.float16, torch.bfloat16, torch.float32, 8, 4]
"""Of scales or zero points: a dtype, or the bits of codes."""


@dataclass
class Packed:
    """A weight ``[*stack, N, K]`` as the operators take it."""

    tensors: list[Any]  # qdata, scale, zero_point
    settings: tuple[Any, ...]

    def dense(self) -> Tensor:
        return reference.dequantize(*self.tensors, *self.settings, torch.float32)

    def scale(self) -> Tensor | None:
        """That of each weight, of axis 0."""
        meta, _, _, group_size, axis, K = self.settings
        scale, _ = reference.plain_meta(self.tensors[1], self.tensors[2], meta, group_size, axis, K)
        return reference.expand_groups(scale, *self.dense().shape[-2:], group_size, 0) if axis == 0 else None

    def span(self) -> Tensor:
        """Bounds of what is summed: zero points are taken out after the sum, tables are integers between their ends."""
        meta, nbits, format, group_size, axis, K = self.settings
        dense = self.dense().abs()
        scale, zero = reference.plain_meta(self.tensors[1], self.tensors[2], meta, group_size, axis, K)
        if format == "int":
            shift = scale * zero
        else:
            table = zero if format == "codebook" else get_format(format).levels(nbits).values
            shift = scale * table.abs().max()
        return 2 * (dense + reference.expand_groups(shift.abs(), *dense.shape[-2:], group_size, axis))


def packed(
    shape: tuple[int, ...], format: tuple[str, int], group_size: int, axis: int, scale: Any, zero: Any,
    own_rows: int = 1, wide: bool = False,
) -> Packed:  # fmt: skip
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
    return Packed(tensors, (meta, nbits, name, size, axis, K))


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


@settings(deadline=None, max_examples=150)
@given(N=st.integers(1, 70), K=st.integers(1, 1200), M=tokens, dtype=dtypes, **weights)
def test_linear_equals_the_dense_product(N, K, M, dtype, **kwargs) -> None:
    w = packed((N, K), **kwargs)
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    with backend("cpu"):
        got = ops.linear(x, *w.tensors, None, None, *w.settings, "float")
    size = size_of_sums(x, w.span(), w.scale())
    worst = ((got.double() - x.double() @ w.dense().double().T).abs() / size).max().item()
    assert worst <= (BOUNDS if kwargs["format"][0] == "int" else TABLE_BOUNDS)[dtype], worst


@settings(deadline=None, max_examples=60)
@given(N=st.integers(1, 70), K=st.integers(1, 1200), M=tokens, dtype=dtypes, **weights)
def test_int8_activations_equal_the_plain_path(N, K, M, dtype, **kwargs) -> None:
    w = packed((N, K), **kwargs)
    x = torch.randn(M, K, generator=torch.manual_seed(1)).to(dtype)
    with backend("auto"):
        got = ops.linear(x, *w.tensors, None, None, *w.settings, "int8")
    want = reference.linear(x, *w.tensors, None, None, *w.settings, "int8")
    size = x.float().abs() @ w.span().T
    worst = ((got.float() - want.float()).abs() / size).max().item()
    bound = 2**-19 if kwargs["format"][0] == "int" else 2**-12
    assert worst <= bound + {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype], worst


@settings(deadline=None, max_examples=100)
@given(N=st.integers(1, 40), K=st.integers(1, 4000), dtype=dtypes, **weights)
def test_dequantize_and_embedding_equal_the_plain_path_to_the_last_bit(N, K, dtype, **kwargs) -> None:
    w = packed((N, K), **kwargs)
    index = torch.randint(0, N, (2, 3), generator=torch.manual_seed(0))
    want = w.dense().to(dtype)
    with backend("cpu"):
        assert torch.equal(ops.dequantize(*w.tensors, *w.settings, dtype), want)
        assert torch.equal(ops.embedding(index, *w.tensors, *w.settings, dtype), want[index])


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 40), K=st.integers(8, 300), counts=st.lists(st.integers(0, 9), min_size=3, max_size=3), **weights
)
def test_experts_their_gradients_and_stacks_equal_the_plain_path(N, K, counts, **kwargs) -> None:
    w = packed((3, N, K), **kwargs)
    dense, span = w.dense(), w.span()
    bound = TABLE_BOUNDS[torch.float32]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    generator = torch.manual_seed(1)
    runs = torch.randn(sum(counts), K, generator=generator, requires_grad=True)
    batch = torch.randn(3, 4, K, generator=generator, requires_grad=True)
    room = torch.zeros(3, N + 2, K + 1)
    with backend("cpu"):
        ops.dequantize_into(room[:, 1:-1, :K], *w.tensors, *w.settings)
        grouped = ops.grouped_linear(runs, ends, *w.tensors, None, *w.settings, "float")
        batched = ops.batched_linear(batch, *w.tensors, None, *w.settings, "float")
    assert torch.equal(room[:, 1:-1, :K], dense)
    for x, got, own in ((runs, grouped, expert), (batch, batched, torch.arange(3))):
        rows, answers = (t if t.ndim == 3 else t.unsqueeze(1) for t in (x.detach(), got.detach()))
        want = rows.double() @ dense[own].double().mT
        assert ((answers - want).abs() <= bound * (rows.double().abs() @ span[own].double().mT)).all()
        grad = torch.randn_like(answers)
        found = torch.autograd.grad(got, x, grad.view_as(got))[0]
        torch.testing.assert_close(found, (grad @ dense[own]).view_as(x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kind", [8, 4])
def test_rows_of_the_wrong_size_are_refused(axis: int, which: int, kind: int) -> None:
    w = packed((48, 300), ("int", 4), 4, axis, kind, kind)
    columns = 75 if axis == 1 else 300
    good = w.tensors[which]
    assert good.shape[-1] == meta_bytes(columns, kind)
    x, index = torch.randn(2, 300), torch.tensor([0])
    expected = (
        rf"{('scale', 'zero_point')[which - 1]} has shape .* x {columns} bytes, or {meta_bytes(columns, 4)} where"
    )
    for bad in (good[:, :-1], torch.cat([good, good[:, :1]], -1), good[:-1] if which == 2 or axis == 1 else good[0]):
        w.tensors[which] = bad
        for call in (
            lambda: ops.linear(x, *w.tensors, None, None, *w.settings, "float"),
            lambda: ops.embedding(index, *w.tensors, *w.settings, torch.float32),
        ):
            with backend("cpu"), pytest.raises(RuntimeError, match=expected):
                call()
        if bad.ndim == 2:
            stack = [t.unsqueeze(0) for t in w.tensors]
            meta = [m.unsqueeze(0) for m in w.settings[0]]
            fits = "zero_point .* does not fit scale|" if bad.shape[0] != good.shape[0] else ""
            with backend("cpu"), pytest.raises(RuntimeError, match=fits + expected):
                ops.dequantize(*stack, meta, *w.settings[1:], torch.float32)


def test_scales_of_scales_must_fit_and_be_there() -> None:
    w = packed((16, 256), ("int", 4), 16, 1, 4, 8)
    meta, *rest = w.settings
    x = torch.randn(1, 256)
    for bad, message in (
        ([], "need their own scale"),
        (meta[:2], "need their own scale"),
        ([m[:, :8] for m in meta], r"meta must be two tensors \[rows, 16\]"),
        ([meta[0], meta[1].repeat(2, 1), *meta[2:]], r"meta must be two tensors \[rows, 16\]"),
        ([m[:0] for m in meta], r"meta must be two tensors \[rows, 16\]"),
    ):
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            ops.linear(x, *w.tensors, None, None, bad, *rest, "float")
