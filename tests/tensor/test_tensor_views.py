"""Slices, chunks and joins: the values of the dense ones, views of the same memory, and whatever saves loads again."""

import functools
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, backend, load_model, save_model


@pytest.fixture(autouse=True)
def plain_path():
    """What the tensor does is compared to the last bit; kernels have bounds of their own in tests/kernels."""
    with backend("dequantize"):
        yield


def quantized(shape=(96, 256), row_dims: int = 1, **options) -> HQQTensor:
    w = torch.randn(*shape, generator=torch.manual_seed(0))
    return HQQTensor.from_hp(w, HqqConfig(**{"nbits": 4, "group_size": 64, **options}), row_dims)


def metadata(nbits: int | None) -> dict[str, bool | int]:
    """Options for scales and zero points in ``nbits`` bits, or plain ones."""
    return {} if nbits is None else {"quant_scale": True, "quant_zero": True, "meta_nbits": nbits}


@pytest.mark.parametrize("nbits", range(1, 9))
def test_slices_are_views_of_the_dense_slices(nbits: int) -> None:
    q = quantized((96, 384), nbits=nbits)
    d = q.dequantize()
    assert torch.equal(q[10:20].dequantize(), d[10:20])
    assert torch.equal(q.narrow(1, 128, 256).dequantize(), d[:, 128:])
    assert q[10:20].qdata.data_ptr() == q.qdata[10].data_ptr()
    for dim in (0, 1):
        parts = q.chunk(3, dim=dim)
        assert torch.equal(torch.cat(parts, dim).dequantize(), d)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        q[:, 64:128]


@pytest.mark.parametrize("meta", [8, 4])
def test_quantized_scales_are_cut_at_whole_blocks_of_groups(meta: int) -> None:
    q = quantized((24, 4 * 300), group_size=4, **metadata(meta))
    d = q.dequantize()
    parts = [q[:, :512], q[:, 512:1024], q[:, 1024:]]
    assert torch.equal(torch.cat(parts[:2], 1).dequantize(), d[:, :1024])
    assert torch.equal(torch.cat(parts, 1).dequantize(), d) and torch.equal(parts[2].dequantize(), d[:, 1024:])
    if meta == 8:  # a byte each, which can be cut anywhere
        assert torch.equal(q[:, 128:256].dequantize(), d[:, 128:256])
        return
    with pytest.raises(
        NotImplementedError, match=r"4 bits can be cut at multiples of 128 groups, got 0:32.*meta_nbits"
    ):
        q[:, :128]


@pytest.mark.parametrize("settings", [{"axis": 0}, metadata(8), {"axis": 0, **metadata(8)}, metadata(4)])
def test_rows_that_share_scales_are_cut_anywhere_and_written(settings: dict) -> None:
    q = quantized((256, 128), group_size=64, **settings)
    d = q.dequantize()
    part = q[101:150]
    assert torch.equal(part.dequantize(), d[101:150]) and torch.equal(part[7:, :].dequantize(), d[108:150])
    assert [torch.equal(a.dequantize(), b) for a, b in zip(q.split(37), d.split(37), strict=True)] == [True] * 7
    to = q.new_zeros(q.shape)
    for first in range(0, 256, 37):  # piece by piece, as a distributed checkpoint is read
        to[first : first + 37].detach().copy_(q[first : first + 37])
    assert torch.equal(to, q)


def test_experts_can_be_selected_and_written() -> None:
    e = quantized((3, 96, 256))
    other = e[2].clone()
    assert not torch.equal(e[1].dequantize(), other.dequantize())
    e[1].copy_(other)
    assert torch.equal(e[1].dequantize(), other.dequantize())
    assert not torch.equal(e[0].dequantize(), other.dequantize())


def test_rows_of_axis_0_are_joined_only_where_they_stay_in_their_groups() -> None:
    q = quantized((256, 64), axis=0)  # row n belongs to group n % 4
    d = q.dequantize()
    assert torch.equal(torch.cat([q[:100], q[104:]]).dequantize(), torch.cat([d[:100], d[104:]]))
    with pytest.raises(NotImplementedError, match=r"multiples of the 4 groups, got \[101\]"):
        torch.cat([q[:101], q[104:]])
    twice = torch.cat([q, q])
    assert twice.group_size == 128 and torch.equal(twice.dequantize(), torch.cat([d, d]))
    assert torch.equal(torch.cat([twice, q]).dequantize(), torch.cat([d, d, d]))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("meta", [None, 4])
def test_empty_slices_are_like_the_dense_ones(axis: int, meta: int | None) -> None:
    q = quantized((96, 256), axis=axis, group_size=16, **metadata(meta))
    d = q.dequantize()
    for cut in (lambda t: t[:0], lambda t: t[5:5], lambda t: t[96:], lambda t: t[:, 7:7], lambda t: t[:0][:, :0]):
        assert cut(q).shape == cut(d).shape and isinstance(cut(q), HQQTensor)
    none = q[:0]
    assert [t.shape for t in none.chunk(3)] == [t.shape for t in d[:0].chunk(3)]
    assert [t.shape for t in none.split(5)] == [t.shape for t in d[:0].split(5)]
    assert torch.equal(torch.cat([none, q]), q) and torch.equal(torch.cat([q, q[:, :0]], 1), q)


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"format": "codebook"}, {"activation": "int8"}, metadata(4)])
def test_products_with_no_in_features_are_the_dense_ones(options: dict) -> None:
    q, bias = quantized((96, 256), **options)[:, :0], torch.randn(96)
    d = q.dequantize()
    for x in (torch.empty(2, 3, 0), torch.empty(3, 0, dtype=torch.bfloat16)):
        assert torch.equal(F.linear(x, q), torch.zeros(*x.shape[:-1], 96, dtype=x.dtype))
        assert torch.equal(F.linear(x, q, bias), bias.to(x.dtype).expand(*x.shape[:-1], 96))
        assert torch.equal(x @ q.t(), F.linear(x, q))
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(3, 5), q)
    indices = torch.tensor([1, 95])
    assert torch.equal(F.embedding(indices, q), F.embedding(indices, d))


def test_products_of_experts_with_no_in_features_are_zeros() -> None:
    q = quantized((3, 96, 256))[:, :, :0].transpose(1, 2)
    assert torch.equal(torch.bmm(torch.empty(3, 5, 0), q), torch.zeros(3, 5, 96))
    ends = torch.tensor([1, 1, 4], dtype=torch.int32)
    assert torch.equal(F.grouped_mm(torch.empty(4, 0), q, offs=ends), torch.zeros(4, 96))


def test_every_name_of_the_transpose_swaps_the_last_two_dimensions() -> None:
    q, e = quantized((96, 256)), quantized((3, 96, 256))
    for transpose in (
        lambda t: t.T,
        lambda t: t.mT,
        lambda t: t.H,
        lambda t: t.permute(1, 0),
        lambda t: t.permute(-1, 0),
    ):
        assert transpose(q).transposed and torch.equal(transpose(q), q.t())
        assert torch.equal(transpose(transpose(q)), q)
    for transpose in (
        lambda t: t.mT,
        lambda t: t.permute(0, 2, 1),
        lambda t: t.movedim(1, 2),
        lambda t: t.transpose(-1, 1),
    ):
        assert torch.equal(transpose(e).dequantize(), transpose(e.dequantize()))
    assert torch.equal(e.permute(0, 1, 2), e) and torch.equal(e.transpose(1, 1), e)
    for transpose in (lambda t: t.permute(2, 0, 1), lambda t: t.transpose(0, 1)):
        with pytest.raises(NotImplementedError, match=r"only the last two dimensions .* can be swapped, got the order"):
            transpose(e)
    with pytest.raises(RuntimeError):
        q.permute(0, 0)


def test_splits_that_leave_rows_out_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="sizes"):
        quantized().split([8, 8])


WEIGHTS = [
    {"nbits": 4, "group_size": 16}, {"nbits": 3, "group_size": 16, "axis": 0}, {"nbits": 2, "group_size": None},
    {"nbits": 4, "group_size": 128, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    {"nbits": 5, "group_size": 8, "axis": 0, "quant_scale": True}, {"nbits": 8, "group_size": None, "axis": 0},
    {"nbits": 4, "group_size": 64, "format": "nf4"}, {"nbits": 3, "group_size": 32, "format": "codebook"},
    {"nbits": 2, "group_size": 32, "format": "codebook", "codebook": "row"}, {"nbits": 4, "view_as_float": True},
    {"nbits": 4, "group_size": 64, "rotation": True},
]  # fmt: skip
SHAPES = [((48, 384), 1), ((37, 300), 1), ((1, 128), 1), ((3, 16, 256), 1), ((16, 16, 2, 4), 3)]


@functools.cache
def cached(shape: tuple[int, ...], row_dims: int, options: tuple) -> tuple[HQQTensor, torch.Tensor]:
    q = quantized(shape, row_dims, solver="rtn", **dict(options))
    return q, q.dequantize()


def saved_and_loaded(q: HQQTensor) -> HQQTensor:
    with tempfile.TemporaryDirectory() as folder:
        save_model(nn.ParameterDict({"w": nn.Parameter(q, requires_grad=False)}), Path(folder))
        model = nn.ParameterDict({"w": nn.Parameter(torch.empty(q.shape, dtype=q.dtype, device="meta"))})
        assert load_model(model, Path(folder)) == ([], [])
        return model["w"].detach().clone()  # the file goes


def one_step(data: st.DataObject, q: HQQTensor) -> tuple[HQQTensor, object]:
    """A view or join of ``q``, and the function that does the same to a dense tensor."""
    dim = data.draw(st.integers(0, q.ndim - 1))
    length = q.shape[dim]
    kind = data.draw(st.sampled_from(["slice", "aligned", "chunk", "join", "transpose"]))
    if kind in ("slice", "aligned"):
        step = 1 if kind == "slice" else data.draw(st.sampled_from([3, 4, 8, 128]))
        start, end = sorted(data.draw(st.integers(0, length // step)) * step for _ in range(2))
        return (same := lambda t: t.narrow(dim, start, end - start))(q), same
    if kind == "chunk":
        count, index = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
        return (same := lambda t: t.chunk(count, dim)[index % len(t.chunk(count, dim))])(q), same
    if kind == "join":
        count, order = data.draw(st.integers(1, 4)), data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))

        def same(t):
            parts = t.chunk(count, dim)
            return torch.cat([parts[i % len(parts)] for i in order], dim)

        return same(q), same
    return (same := lambda t: t.transpose(-1, -2))(q), same


@settings(deadline=None, max_examples=100)
@given(data=st.data(), options=st.sampled_from(WEIGHTS), case=st.sampled_from(SHAPES))
def test_any_chain_of_views_that_saves_loads_equal(data, options, case) -> None:
    shape, row_dims = case
    options = {"group_size": 8, **options}
    rows, columns = math.prod(shape[-row_dims - 1 : -row_dims]), math.prod(shape[-row_dims:])
    size = options["group_size"]
    options["group_size"] = size and min(size, rows if options.get("axis") == 0 else columns)
    if (columns % 64 and options.get("rotation")) or (columns % 8 and options.get("view_as_float")):
        return
    q, d = cached(shape, row_dims, tuple(options.items()))
    for _ in range(data.draw(st.integers(1, 4))):
        try:
            q, same = one_step(data, q)
        except NotImplementedError:
            continue
        d = same(d)
        assert q.shape == d.shape
    if d.numel():
        assert torch.equal(q.dequantize(), d)
    loaded = saved_and_loaded(q)
    assert loaded.shape == q.shape and torch.equal(loaded, q)
