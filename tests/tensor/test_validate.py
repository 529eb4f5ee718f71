"""Every way to make an HQQTensor from stored parts checks them before anything is computed."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hqqtensor import HqqConfig, HQQTensor

DATA = (*HQQTensor.tensor_data_names, *HQQTensor.optional_tensor_data_names)


def quantized(**options: Any) -> HQQTensor:
    w = torch.randn(96, 256, generator=torch.manual_seed(0))
    return HQQTensor.from_hp(w, HqqConfig(**{"nbits": 4, "group_size": 64, **options}))


def nested() -> HQQTensor:
    return quantized(group_size=16, quant_scale=True, quant_zero=True)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"nbits": 5}, r"qdata must be \[96, 160\] bytes, got \[96, 128\]"),
    ({"nbits": 9}, "nbits of format 'int' must be one of"),
    ({"nbits": True}, "nbits .* got True"),
    ({"group_size": 32}, r"scale must be \[96, 8\] .* got \[96, 4\]"),
    ({"group_size": 0}, "group_size must be from 1"),
    ({"group_size": 2**63 - 1}, "group_size must be from 1"),
    ({"axis": 0}, r"scale must be \[96, 256\]"),
    ({"axis": 2}, "axis must be 0 or 1"),
    ({"format": "fp4"}, "format 'fp4' has no zero_point"),
    ({"format": "nf3"}, "format must be one of"),
    ({"format": []}, r"format must be a name, got \[\]"),
    ({"format": "codebook"}, r"zero_point must be \[96, 16\]"),
    ({"activation": "int4"}, "activation must be one of"),
    ({"transposed": 1}, "transposed must be True or False"),
    ({"transposed": True}, "qdata must be"),
    ({"row_dims": 2}, "row_dims must be 1"),
    ({"rotation": 3}, "rotation must be 0 or a power of two"),
    ({"rotation": 512}, "that divides 256 in_features, got 512"),
    ({"rotation": -64}, "rotation must be 0"),
    ({"qdata": None}, "qdata must be a tensor, got NoneType"),
    ({"qdata": torch.zeros(96, 128, dtype=torch.int8)}, "qdata must be uint8"),
    ({"qdata": torch.zeros(95, 128, dtype=torch.uint8)}, "qdata must be"),
    ({"scale": torch.zeros(96, 4, dtype=torch.float64)}, "scale must be .* got .* torch.float64"),
    ({"scale": torch.zeros(48, 4)}, "scale must be"),
    ({"scale": torch.zeros(())}, "scale must be"),
    ({"scale": torch.zeros(96, 4, device="meta")}, "scale must be on cpu as qdata is, got meta"),
    ({"scale": torch.zeros(96, 4).to_sparse()}, "scale must be"),
    ({"zero_point": None}, "zero_point must be a tensor, got NoneType"),
    ({"zero_point": torch.zeros(96, 3)}, r"zero_point must be \[96, 4\]"),
    ({"act_pre_scale": torch.ones(255)}, r"act_pre_scale must be \[256\]"),
]
NESTED: list[tuple[str, dict[str, Any], str]] = [
    ("scale", {"nbits": 4}, "qdata must be"),
    ("scale", {"nbits": 2, "qdata": torch.zeros(96, 4, dtype=torch.uint8)}, "integers of 8 or 4 bits"),
    ("zero_point", {"shape": torch.Size((96, 15))}, "scale must be"),
    ("zero_point", {"act_pre_scale": torch.ones(16)}, "no further quantized or scaled"),
]


def forged(q: HQQTensor, changes: dict[str, Any]) -> HQQTensor:
    """A tensor whose attributes were changed behind its back, as in a file that someone made."""
    q = copy.deepcopy(q)
    q.__dict__.update(changes)
    return q


@pytest.mark.parametrize(
    ("changes", "match"), [*BAD, ({"shape": (96, 128)}, "qdata"), ({"dtype": torch.int8}, "dtype")]
)
def test_the_constructor_refuses_parts_that_do_not_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantized().with_data(**changes)


@pytest.mark.parametrize(("changes", "match"), BAD)
def test_unflatten_refuses_them(changes: dict[str, Any], match: str) -> None:
    q = quantized()
    names, attributes = q.__tensor_flatten__()
    data = {name: getattr(q, name) for name in names} | {n: t for n, t in changes.items() if n in DATA}
    attributes = attributes | {n: value for n, value in changes.items() if n not in DATA}
    with pytest.raises(ValueError, match=match):
        HQQTensor.__tensor_unflatten__(data, attributes, q.shape, q.stride())


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(("changes", "match"), BAD)
def test_torch_load_refuses_them(weights_only: bool, changes: dict[str, Any], match: str) -> None:
    file = io.BytesIO()
    torch.save({"w": forged(quantized(), changes)}, file)
    file.seek(0)
    with pytest.raises((ValueError, pickle.UnpicklingError), match=match):
        torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize(("changes", "match"), [case for case in BAD if case[0].get("qdata", 1) is not None])
def test_loading_a_state_by_assignment_refuses_them(changes: dict[str, Any], match: str) -> None:
    layer = nn.Linear(256, 96, bias=False)
    before = layer.weight
    with pytest.raises((ValueError, RuntimeError, AttributeError), match=match):
        layer.load_state_dict({"weight": forged(quantized(), changes)}, assign=True)
    assert layer.weight is before


@pytest.mark.parametrize(("part", "changes", "match"), NESTED)
def test_quantized_scales_that_do_not_fit_are_refused(part: str, changes: dict[str, Any], match: str) -> None:
    q = nested()
    q.with_data()
    with pytest.raises(ValueError, match=match):
        q.with_data(**{part: getattr(q, part).with_data(**changes)})
    with pytest.raises(
        ValueError, match=rf"{part}: quantized as \[96, 16\] it must have \[96, 16\] bytes, got \[48, 16\]"
    ):
        q.with_data(**{part: getattr(q, part)[:48]})
    with pytest.raises(ValueError, match="no further quantized"):
        q.with_data(scale=forged(q.scale, {"nested": True}))


def test_what_follows_from_the_attributes_is_not_read_from_a_pickle() -> None:
    q, file = quantized(), io.BytesIO()
    parameter = nn.Parameter(q, requires_grad=False)
    parameter.note = "by other code"
    torch.save(forged(parameter, {"in_features": 2**40, "rank": 5, "nested": True}), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, nn.Parameter) and torch.equal(loaded, q) and loaded.note == "by other code"
    assert (loaded.in_features, loaded.rank, loaded.nested) == (256, 2, False)


def test_packed_codes_cannot_be_a_quantized_tensor() -> None:
    q = quantized()
    file = io.BytesIO()
    torch.save(forged(q, {"qdata": q}), file)
    file.seek(0)
    with pytest.raises(ValueError, match="qdata must hold packed codes"):
        torch.load(file, weights_only=True)


def test_pickles_of_before_an_attribute_was_there_are_read() -> None:
    q = quantized()
    old = copy.deepcopy(q)
    for name in ("rotation", "row_dims", "activation", "act_pre_scale"):
        del old.__dict__[name]
    assert torch.equal(pickle.loads(pickle.dumps(old)), q)


def test_a_check_does_not_look_at_the_numbers() -> None:
    """Two to the 40 weights on the meta device: there are none to look at, and no time to do so."""
    n = 2**20
    meta = {"device": "meta", "dtype": torch.float16}
    qdata = torch.empty(n, n // 2, dtype=torch.uint8, device="meta")
    scale, zero = torch.empty(n, n // 64, **meta), torch.empty(n, n // 64, **meta)
    q = HQQTensor(qdata, scale, 4, 64, 1, torch.Size((n, n)), torch.float32, zero_point=zero)
    assert q.t().shape == (n, n)
    with pytest.raises(ValueError, match="scale must be"):
        q.with_data(scale=scale[1:])


@pytest.mark.parametrize("make", [quantized, nested])
def test_fakes_with_symbols_for_sizes_are_let_through(make: Any) -> None:
    q = make()
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(q, static_shapes=False)
        again = fake.with_data()
    assert isinstance(again, HQQTensor) and again.nbits == 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_returns_a_weight_that_was_checked(dynamic: bool) -> None:
    q = quantized()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def halves(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return w[:48].clone(), nn.functional.linear(x, w)

    for count in (3, 5):
        half, y = halves(q, torch.randn(count, 256))
        assert isinstance(half, HQQTensor) and torch.equal(half, q[:48]) and y.shape == (count, 96)


def test_a_view_of_codes_that_cannot_be_undone_is_refused() -> None:
    """Bytes of rows that are not in one piece cannot be read through a view of another size."""
    w = HQQTensor.from_hp(torch.randn(24, 64), HqqConfig(4, 16, view_as_float=True))
    with pytest.raises(ValueError, match="rows in one piece"):
        w.with_data(qdata=w.qdata.t().contiguous().t())
