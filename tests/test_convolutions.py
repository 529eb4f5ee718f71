"""Weights of convolutions: kept as rows of C times the kernel, dequantized where they are used."""

import copy
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import quantize_ as torchao_quantize

from hqqtensor import HqqConfig, HQQTensor, dequantize_, load_model, quantize_, save_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.layout import CheckpointError, flatten, parse_entry

PLAIN, TRANSPOSED = [nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def is_conv(module: nn.Module, name: str = "") -> bool:
    return isinstance(module, (*PLAIN, *TRANSPOSED))


def dense_copy(module: nn.Module) -> nn.Module:
    out = copy.deepcopy(module)
    dequantize_(out)
    return out


EVERY = [{}, {"bias": False, "stride": 2, "padding": 1}, {"groups": 4, "dilation": 2}]
NOT_TRANSPOSED = [{"padding": "same"}, {"padding": 2, "padding_mode": "circular"}]


@pytest.mark.parametrize(
    ("kind", "options"),
    [*itertools.product(PLAIN + TRANSPOSED, EVERY), *itertools.product(PLAIN, NOT_TRANSPOSED)],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_a_module_computes_what_its_dequantized_copy_does(kind: type, options: dict) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(kind(8, 12, 3, **options))
    shape = m[0].weight.shape
    quantize_(m, HqqConfig(4, 6), filter_fn=is_conv)
    assert isinstance(m[0].weight, HQQTensor) and m[0].weight.shape == shape and type(m[0]) is kind
    x = torch.randn(2, 8, *[9] * (len(shape) - 2), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got, want = m(x), dense_copy(m)(y)
    assert torch.equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(x.grad, y.grad) and m[0].weight.grad is None
    if m[0].bias is not None:
        assert m[0].bias.grad is not None


@settings(deadline=None, max_examples=40)
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([4, 16, 30, None]),
    axis=st.sampled_from([0, 1]),
    kernel=st.sampled_from([(1,), (5,), (3, 3), (2, 4), (2, 1, 3)]),
    channels=st.integers(32, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    format=st.sampled_from(["int", "codebook"]),
    solver=st.sampled_from(["hqq_joint", "rtn", "column_scaled"]),
)
def test_it_is_the_flattened_matrix_in_every_setting(
    nbits, group_size, axis, kernel, channels, dtype, format, solver
) -> None:
    if format == "codebook":
        nbits = min(nbits, 4)
    if format == "codebook" or axis == 0:
        solver = "hqq_joint" if solver == "column_scaled" else solver
    w = torch.randn(33, channels, *kernel, generator=torch.manual_seed(0)).to(dtype)
    config = HqqConfig(nbits, group_size, axis=axis, format=format, solver=solver)
    q, flat = HQQTensor.from_hp(w, config, row_dims=w.ndim - 1), HQQTensor.from_hp(w.flatten(1), config)
    assert torch.equal(q.dequantize(), flat.dequantize().view(w.shape)) and q.dequantize().dtype == dtype
    assert q.nbytes == flat.nbytes and (q.out_features, q.in_features) == flat.shape


def test_a_tag_takes_a_convolution_and_nothing_else_does() -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"stem": nn.Conv2d(3, 16, 4), "body": nn.Conv1d(16, 16, 3), "head": nn.Linear(64, 8)})

    m = model()
    quantize_(m, HqqConfig(4, 64))
    assert type(m["stem"].weight) is nn.Parameter and isinstance(m["head"].weight, HQQTensor)
    m = model()
    quantize_(m, HqqConfig(4, 64, dynamic_config={"stem": {"nbits": 8, "group_size": 48}}))
    assert m["stem"].weight.nbits == 8 and type(m["body"].weight) is nn.Parameter
    assert "HQQTensor(8-bit" in repr(m["stem"]) and "kernel_size=(4, 4)" in repr(m["stem"])


def test_torchao_quantizes_convolutions_that_its_filter_takes() -> None:
    m = nn.Sequential(nn.Conv2d(8, 16, 3))
    own = copy.deepcopy(m)
    torchao_quantize(m, HqqConfig(4, 24), filter_fn=is_conv)
    quantize_(own, HqqConfig(4, 24), filter_fn=is_conv)
    assert torch.equal(m[0].weight, own[0].weight) and m[0].weight.shape == (16, 8, 3, 3)


def test_bad_settings_name_the_layer_and_change_nothing() -> None:
    m = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(32, 32, 3, groups=32))
    with pytest.raises(ValueError, match=r"1\.weight: group_size 64 is larger than in_features 9"):
        quantize_(m, HqqConfig(4, 64, dynamic_config={"1": {}}))
    with pytest.raises(ValueError, match=r"1\.weight: a convolution .* activation 'int8' does nothing there"):
        quantize_(m, HqqConfig(4, 64, activation="int8", dynamic_config={"1": {"group_size": None}}))
    assert not any(isinstance(p, HQQTensor) for p in m.parameters())
    with pytest.raises(ValueError, match="row_dims must be 1 or 3"):
        HQQTensor.from_hp(torch.randn(4, 4, 4, 4), HqqConfig(4, 4), row_dims=2)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("meta", [None, 8, 4])
def test_it_is_saved_loaded_and_inspected(axis: int, meta: int | None, tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8))

    m = model()
    options = {} if meta is None else {"quant_scale": True, "quant_zero": True, "meta_nbits": meta}
    config = HqqConfig(3, 8, axis=axis, dynamic_config={"0": {}, "1": {"nbits": 5}}, **options)
    quantize_(m, config)
    save_model(m, tmp_path)
    with torch.device("meta"):
        again = model()
    load_model(again, tmp_path)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    third = model()
    third.load_state_dict(torch.load(file, weights_only=True), assign=True)
    for name, p in m.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]) and torch.equal(p, third.state_dict()[name]), name
    again.load_state_dict(m.state_dict())
    assert [t.shape for t in inspect_checkpoint(tmp_path).tensors if t.kind == "hqq"] == [
        [8, 4, 3],
        [8, 8, 3, 3],
        [8, 8],
    ]


@pytest.mark.parametrize("bad", [0, 2, 4, -1, True, "3", None])
def test_a_file_with_rows_of_another_kind_is_refused(bad: object) -> None:
    q = HQQTensor.from_hp(torch.randn(4, 4, 3, 3), HqqConfig(4, 4), row_dims=3)
    entry = json.loads(flatten("w", q)[1])
    assert parse_entry("w", json.dumps(entry))["_data"]["row_dims"] == 3
    entry["_data"]["row_dims"] = bad
    with pytest.raises(CheckpointError, match="row_dims"):
        parse_entry("w", json.dumps(entry))


def test_it_compiles_in_one_graph_and_exports() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding="same"))
    quantize_(m, HqqConfig(4, 9), filter_fn=is_conv)
    x = torch.randn(2, 3, 8, 8)
    want = m(x)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), want)


def test_autocast_takes_it_like_a_dense_convolution() -> None:
    m = nn.Sequential(nn.Conv2d(3, 8, 3))
    quantize_(m, HqqConfig(4, 9), filter_fn=is_conv)
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = m(x), dense_copy(m)(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    assert m.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_views_are_along_the_first_dimension() -> None:
    w = torch.randn(12, 8, 3, 3, generator=torch.manual_seed(0))
    q = HQQTensor.from_hp(w, HqqConfig(4, 24), row_dims=3)
    d = q.dequantize()
    assert torch.equal(q[4:8].dequantize(), d[4:8]) and q[4:8].qdata.data_ptr() == q.qdata[4].data_ptr()
    assert torch.equal(torch.cat(q.chunk(3)).dequantize(), d) and torch.equal(q[:, :].dequantize(), d)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(F.conv2d(input=x, weight=q[4:8], stride=2), F.conv2d(x, d[4:8], stride=2))
    for operation in (
        lambda: q[:, 2:4], lambda: q[0], lambda: q[..., 0], lambda: q.transpose(2, 3), lambda: q.flatten(1),
        lambda: q[torch.tensor([0, 1])], lambda: torch.cat([q, q], 1), lambda: q.chunk(2, 1),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError):
            operation()
    other = HQQTensor.from_hp(w.view(12, 4, 6, 3), HqqConfig(4, 24), row_dims=3)
    with pytest.raises(ValueError, match="quantized alike"):
        torch.cat([q, other])
    one = HQQTensor.from_hp(w[:, :, 0], HqqConfig(4, 24), row_dims=2)
    with pytest.raises(NotImplementedError):
        one[torch.tensor([0])]
