"""Wrong arguments are refused before memory is read, with one message from kernels, plain path and fake tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_fresh
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hqqtensor import HqqConfig, HQQTensor, backend, ops
from hqqtensor.kernels import cpu
from hqqtensor.ops import PackedWeight

compiled = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

K = 256


def packed(*shape: int, **settings: Any) -> PackedWeight:
    config = HqqConfig(**{"nbits": 4, "group_size": 64, **settings})
    return HQQTensor.from_hp(torch.randn(*shape, K, generator=torch.manual_seed(0)), config).operand()


ONE, STACK = packed(64), packed(2, 3, 8)
META = packed(64, quant_scale=True, quant_zero=True)
TABLE, ROWS = packed(64, format="nf4"), packed(64, format="codebook", codebook="row")

SETTINGS = [
    ({"nbits": 0}, "nbits must be 1 to 8, got 0"),
    ({"nbits": 9}, "nbits must be 1 to 8, got 9"),
    ({"axis": 2}, "axis must be 0 or 1, got 2"),
    ({"group_size": 0}, "group_size must be 1 to 1099511627776, got 0"),
    ({"group_size": 2**63 - 1}, f"group_size must be 1 to 1099511627776, got {2**63 - 1}"),
    ({"in_features": -1}, "in_features must be 1 to 1099511627776, got -1"),
    ({"in_features": 2**62}, f"in_features must be 1 to 1099511627776, got {2**62}"),
    ({"in_features": 200}, r"qdata must be uint8 \[.*N, 100\], got uint8 \[.*128\]"),
]


def data(w: PackedWeight) -> list[tuple[dict[str, Any], str]]:
    """Changes of tensors, each with the message that names it."""
    shape = [*w.qdata.shape[:-1], 4]
    values = rf"must be floating-point {shape}, or uint8 {shape} or {[*shape[:-1], 2]}, got".replace("[", r"\[")
    zero = w.zero_point
    assert zero is not None
    return [
        ({"qdata": w.qdata.to(torch.int8)}, r"qdata must be uint8 .* got int8"),
        ({"qdata": w.qdata[..., 0]}, r"qdata must be uint8"),
        ({"scale": w.scale[..., :3]}, rf"scale {values} float16 \[.*3\]"),
        ({"scale": w.scale.int()}, rf"scale {values} int32"),
        ({"scale": w.scale.unsqueeze(0)}, rf"scale {values} float16"),
        ({"scale": w.scale[..., :0]}, rf"scale {values} float16 \[.*0\]"),
        ({"zero_point": None}, "format 'int' needs a zero_point, got none"),
        ({"zero_point": zero[..., :1, :]}, rf"zero_point {values} float16"),
        ({"zero_point": zero.flatten(0, -2).double()}, rf"zero_point {values} float64" if zero.ndim > 2 else ""),
        ({"zero_point": zero.bool()}, rf"zero_point {values} bool"),
        ({"meta": [torch.ones(1, 4)]}, "meta must have 0 tensors, .* got 1"),
    ]


MORE = [
    (META, {"meta": None}, r"meta must begin with a scale .* got 0 tensors"),
    (META, {"meta": META.meta[:3]}, r"meta must begin with a scale .* got 3 tensors"),
    (META, {"meta": [*META.meta, META.meta[0]]}, r"meta must have 4 tensors, .* got 5"),
    (
        META,
        {"meta": [t[:, :1] for t in META.meta]},
        r"meta\[0\] must be floating-point \[1, 4\] or with more rows, got",
    ),
    (
        META,
        {"meta": [META.meta[0].repeat(2, 1), *META.meta[1:]]},
        "meta must have a scale and a zero point of one shape",
    ),
    (TABLE, {"zero_point": ONE.zero_point}, r"format 'nf4' has no zero_point, got float16 \[64, 4\]"),
    (ROWS, {"zero_point": None}, r"a codebook must be floating-point \[16\], \[1, 16\] or \[64, 16\], got none"),
    (ROWS, {"zero_point": ROWS.zero_point[:9]}, r"a codebook must be .* got float16 \[9, 16\]"),
    (ROWS, {"zero_point": ROWS.zero_point.unsqueeze(0)}, r"a codebook must be .* got float16 \[1, 64, 16\]"),
]


def message(call: Callable[[], Any]) -> str:
    """That of the error, without the path's own name of another error than RuntimeError."""
    with pytest.raises((RuntimeError, ValueError, IndexError)) as found:
        call()
    return str(found.value).removeprefix("ValueError: ")


def messages(function: Callable[..., Any], *args: Any) -> set[str]:
    """What the compiled kernels, the plain path and fake tensors say."""
    found = {message(lambda: function(*args))}
    with backend("reference"):
        found.add(message(lambda: function(*args)))
    with FakeTensorMode() as mode:

        def fake(a: Any) -> Any:
            return torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, a)

        found.add(message(lambda: function(*map(fake, args))))
    return found


def assert_one(expected: str, function: Callable[..., Any], *args: Any) -> None:
    found = messages(function, *args)
    assert len(found) == 1, found
    with pytest.raises(RuntimeError, match=expected):
        raise RuntimeError(*found)


@compiled
@pytest.mark.parametrize(("change", "expected"), [c for c in [*SETTINGS, *data(ONE)] if c[1]], ids=str)
def test_a_weight_that_does_not_fit_is_named_by_every_operator(change: dict[str, Any], expected: str) -> None:
    w = ONE._replace(**change)
    x, index = torch.randn(3, K), torch.tensor([0])
    assert_one(expected, ops.linear, x, w)
    assert_one(expected, ops.embedding, index, w, torch.float32)
    assert_one(expected, ops.linear_many, x, [ONE, w]) if "qdata" in change or "scale" in change else None
    assert_one(expected, ops.dequantize_into, torch.empty(64, K), w)


@compiled
@pytest.mark.parametrize(("change", "expected"), [*SETTINGS, *data(STACK)], ids=str)
def test_a_stack_that_does_not_fit_is_named(change: dict[str, Any], expected: str) -> None:
    assert_one(expected, ops.dequantize, STACK._replace(**change), torch.float32)


@compiled
@pytest.mark.parametrize(("w", "change", "expected"), MORE, ids=[m[2] for m in MORE])
def test_second_levels_and_tables_that_do_not_fit_are_named(w: PackedWeight, change: dict, expected: str) -> None:
    assert_one(expected, ops.linear, torch.randn(3, K), w._replace(**change))
    assert_one(expected, ops.dequantize, w._replace(**change), torch.float32)


@compiled
def test_other_arguments_that_do_not_fit_are_named() -> None:
    x, experts = torch.randn(3, K), packed(2, 64)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    batch = torch.randn(2, 5, K)
    for expected, function, *args in (
        (r"linear: input must be floating-point \[..., 256\], got float32 \[3, 255\]", ops.linear, x[:, 1:], ONE),
        (r"linear: input must be .* got int64 \[3, 256\]", ops.linear, x.long(), ONE),
        (r"bias must be floating-point \[64\], got float32 \[63\]", ops.linear, x, ONE, torch.ones(63)),
        (r"act_pre_scale must be floating-point \[256\], got int64", ops.linear, x, ONE, None, torch.arange(K)),
        ("activation must be 'float', 'exact', 'high' or 'int8', got 'int4'", ops.linear, x, ONE, None, None, "int4"),
        (r"qdata must be uint8 \[N, 128\], got uint8 \[2, 64, 128\]", ops.linear, x, experts),
        (r"qdata must be uint8 \[E, N, 128\], got uint8 \[64, 128\]", ops.grouped_linear, x, ends, ONE),
        (r"offsets must be integers \[2\], got int32 \[1\]", ops.grouped_linear, x, ends[:1], experts),
        (r"offsets must be integers \[2\], got float32 \[2\]", ops.grouped_linear, x, ends.float(), experts),
        (r"grouped_linear: input must be .*\[S, 256\], got", ops.grouped_linear, batch, ends, experts),
        (r"batched_linear: input must be .*\[E, M, 256\], got", ops.batched_linear, x, experts),
        (r"input float32 \[1, 5, 256\] does not fit 2 weights", ops.batched_linear, batch[:1], experts),
        (r"indices must be integers, got bool \[1\]", ops.embedding, torch.tensor([True]), ONE, torch.float32),
        (r"dtype must be one of .*, got torch.int32", ops.dequantize, ONE, torch.int32),
        (r"out must be \[64, 256\] .* strides \[0, 1\]", ops.dequantize_into, torch.empty(1, K).expand(64, K), ONE),
        (r"out must be \[64, 256\] .* strides \[1, 64\]", ops.dequantize_into, torch.empty(K, 64).t(), ONE),
        (r"format must be one of .*, got 'int5'", ops.linear, x, ONE._replace(format="int5")),
        (r"format 'nf4' has \[4\] bits, got 3", ops.linear, x, TABLE._replace(nbits=3)),
    ):
        assert_one(expected, function, *args)


@compiled
@pytest.mark.parametrize("name", ["qdata", "scale", "zero_point", "meta"])
def test_tensors_of_another_device_are_named(name: str) -> None:
    value = getattr(META, name)
    moved = [value[0].to("meta"), *value[1:]] if name == "meta" else value.to("meta")
    w = META._replace(**{name: moved})
    about = {"qdata": "scale is on cpu, qdata on meta", "meta": "meta[0] is on meta, qdata on cpu"}
    expected = about.get(name, f"{name} is on meta, qdata on cpu")
    assert message(lambda: ops.linear(torch.randn(3, K), w)) == expected
    assert message(lambda: ops.dequantize(w, torch.float32)) == expected


@compiled
def test_numbers_of_runs_and_indices_are_checked_on_every_path() -> None:
    x, experts = torch.randn(3, K), packed(2, 64)
    for choice in ("auto", "reference"):
        with backend(choice):
            for ends in ([2, 1], [1, 4], [-1, 2]):
                with pytest.raises(RuntimeError, match="offsets must rise from 0 to at most 3, got"):
                    ops.grouped_linear(x, torch.tensor(ends, dtype=torch.int32), experts)
            for index in (-1, 64, 2**40):
                with pytest.raises(IndexError, match=f"index {index} is not in 0 to 63"):
                    ops.embedding(torch.tensor([3, index]), ONE, torch.float32)


def test_counts_of_lists_must_agree() -> None:
    q, s, z = ONE[:3]
    rest = (4, "int", 64, 1, K, "float")
    for lists in (
        ([], [], None, None),
        ([q, q], [s], [z, z], None),
        ([q, q], [s, s], [z], None),
        ([q], [s], [z], [z] * 2),
    ):
        with pytest.raises(RuntimeError, match=r"linear_many: \d weights have \d scales"):
            torch.ops.hqqtensor.linear_many(torch.randn(1, K), *lists, *rest)


@compiled
def test_empty_weights_give_empty_results() -> None:
    for w in (ONE, META, TABLE, ROWS, packed(64, axis=0)):
        none = w._replace(qdata=w.qdata[:0])
        if w.axis == 1:
            zero = w.zero_point if w.format == "nf4" else w.zero_point[:0]
            none = none._replace(scale=w.scale[:0], zero_point=zero)
        assert ops.linear(torch.randn(3, K), none).shape == (3, 0)
        assert ops.dequantize(none, torch.float32).shape == (0, K)
        assert ops.embedding(torch.empty(0, dtype=torch.long), none, torch.float32).shape == (0, K)


@pytest.mark.parametrize("seed", [0, 10_000])
def test_random_wrong_arguments_never_crash(seed: int) -> None:
    script = (Path(__file__).parents[2] / "fuzz" / "wrong_calls.py").read_text()
    found = run_fresh(script, seed, 1500)
    assert found.returncode == 0, found.stderr[-3000:]
    refused, served = map(int, found.stdout.split()[-2:])
    assert refused > 300 and served > 300
