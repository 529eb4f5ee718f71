"""The torch.library operators and their fake kernels.

``hqqtensor::linear`` and the others have C++ kernels for CPU tensors where the compiled library is there. Everywhere
else, and where those kernels do not serve (a backend chosen by hand, another format), ``hqqtensor::registry_linear``
asks the backend registry when it runs, so a compiled graph follows ``set_backend`` as eager code does.

A product has two operators. ``hqqtensor::linear`` is the public one: it has a gradient (``ops.gradients``), written in
Python, which costs microseconds at every call. ``hqqtensor::_linear`` computes the same without one. Eager code without
gradients calls it directly, and it is what graphs hold below autograd.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtensor.ops import checks
from hqqtensor.ops import reference as reference  # registers the plain backend
from hqqtensor.ops.backend import run as run_backend
from hqqtensor.ops.packed import PackedWeight, flat, structured

_WEIGHT = "Tensor qdata, Tensor scale, Tensor? zero_point"
# Optional lists: AOTInductor hands an empty list over as None.
_SETTINGS = "Tensor[]? meta, int nbits, str format, int group_size, int axis, int in_features"
SCHEMAS = {
    # Weights [..., N, K] of dtype from packed rows [..., N, row_bytes].
    "dequantize": f"({_WEIGHT}, {_SETTINGS}, ScalarType dtype) -> Tensor",
    # x [..., K] times the transpose of packed weights [N, K], plus bias: [..., N] in x's dtype.
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? act_pre_scale, {_SETTINGS}, str activation) -> Tensor",
    # x [E, M, K] times the transpose of each of E packed weights [E, N, K]: [E, M, N].
    "batched_linear": f"(Tensor x, {_WEIGHT}, Tensor? act_pre_scale, {_SETTINGS}, str activation) -> Tensor",
    # Rows of x [S, K] in runs: those before offsets[0] times weight 0, those before offsets[1] times weight 1, and so
    # on (offsets int32 [E], rising): [S, N]; rows from offsets[-1] on are zero.
    "grouped_linear": f"(Tensor x, Tensor offsets, {_WEIGHT}, Tensor? act_pre_scale, {_SETTINGS}, str activation)"
    " -> Tensor",
    # Rows `indices` (any shape, int) of packed weights [N, K]: [*indices.shape, K] of dtype.
    "embedding": f"(Tensor indices, {_WEIGHT}, {_SETTINGS}, ScalarType dtype) -> Tensor",
}
"""Arguments of each operator; those of the weight are explained in ``PackedWeight``.

activation: "exact", as exact as float32 sums (16-bit inputs: finer than they are); "float", the same, but for bfloat16
inputs weights may be rounded to bfloat16; "high", the same, and float32 inputs may be rounded to 16-bit integers
(``torch.set_float32_matmul_precision``); "int8" (see ``HqqConfig``).
"""
PRODUCTS = ("linear", "batched_linear", "grouped_linear")

OPS = torch.ops.hqqtensor
if hasattr(OPS, "linear"):
    raise ImportError(
        "hqqtensor_define_operators() was called in this process, which is for processes that do not import hqqtensor: "
        "import hqqtensor instead of calling it"
    )
LIBRARY = torch.library.Library("hqqtensor", "DEF")

_RESULTS: dict[str, Callable[..., Tensor]] = {
    "dequantize": lambda w, dtype: w.qdata.new_empty(*w.qdata.shape[:-1], w.in_features, dtype=dtype),
    "linear": lambda x, w, *rest: x.new_empty(*x.shape[:-1], w.qdata.shape[-2]),
    "batched_linear": lambda x, w, *rest: x.new_empty(*x.shape[:-1], w.qdata.shape[-2]),
    "grouped_linear": lambda x, offsets, w, *rest: x.new_empty(x.shape[0], w.qdata.shape[-2]),
    "embedding": lambda indices, w, dtype: w.qdata.new_empty(*indices.shape, w.in_features, dtype=dtype),
}


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``hqqtensor::NAME``, which ``run`` computes where no other kernel is registered."""
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hqqtensor::{name}", fake, lib=LIBRARY)


class _LastError(threading.local):
    text = "unknown error"


_last_error = _LastError()


def remembered(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, whose errors the compiled kernels can ask for: what they call hands no text of an error back."""

    def call(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            plain = type(error) is RuntimeError
            _last_error.text = str(error) if plain else f"{type(error).__name__}: {error}"
            raise

    return call


LIBRARY.define("_last_error() -> str")
LIBRARY.impl("_last_error", lambda: _last_error.text, "CompositeExplicitAutograd")


def _from_registry(op: str) -> Callable[..., Tensor]:
    check = getattr(checks, op)

    def run(*args: Any) -> Tensor:
        ours = structured(op, args)
        check(*ours)
        return run_backend(op, args[0].device.type, ours)

    return remembered(run)


def _fake(op: str) -> Callable[..., Tensor]:
    check, result = getattr(checks, op), _RESULTS[op]

    def run(*args: Any) -> Tensor:
        ours = structured(op, args)
        check(*ours)
        return result(*ours)

    return run


for _op, _schema in SCHEMAS.items():
    for _name in (_op, f"registry_{_op}", *([f"_{_op}"] if _op in PRODUCTS else [])):
        define(_name, _schema, _from_registry(_op), _fake(_op))
    # What the compiled kernels give when they are asked by name, None where they do not serve.
    LIBRARY.define(f"_cpu_{_op}{_schema}?")


def _into(*args: Any) -> None:
    out, w = structured("dequantize_into", args)
    checks.dequantize_into(out, w)
    out.copy_(OPS.registry_dequantize(*w, out.dtype))


def _fake_into(*args: Any) -> None:
    checks.dequantize_into(*structured("dequantize_into", args))


# dequantize, written into out [..., N, K] of any floating dtype, whose last dimension has stride 1 (the others any). No
# backend needs a kernel of its own for it: the compiled ones for the CPU have one, the others' results are copied.
for _name in ("dequantize_into", "registry_dequantize_into"):
    define(_name, f"(Tensor(a!) out, {_WEIGHT}, {_SETTINGS}) -> ()", remembered(_into), _fake_into)

# x [..., K] times the transposes of several weights packed alike, [N_i, K], beside each other: [..., sum of N_i]. No
# zero_point where the format has none; a bias and an act_pre_scale for every weight or for none. meta: that of the first
# weight, of the second, and so on in one list, each as in PackedWeight.
_MANY = (
    "(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[]? zero_point, Tensor[]? bias, int nbits, str format, "
    "int group_size, int axis, int in_features, str activation, Tensor[]? meta=None, Tensor[]? act_pre_scale=None)"
    " -> Tensor"
)
Many = tuple[Tensor, list[PackedWeight], list[Tensor | None], str, list[Tensor | None]]


def split_many(
    x: Tensor, qdata: Sequence[Tensor], scale: Sequence[Tensor], zero_point: Sequence[Tensor] | None,
    bias: Sequence[Tensor] | None, nbits: int, format: str, group_size: int, axis: int, in_features: int,
    activation: str, meta: Sequence[Tensor] | None = None, act_pre_scale: Sequence[Tensor] | None = None,
) -> Many:  # fmt: skip
    """The input, the weights, a bias or None for each, the activation, and an act_pre_scale or None for each."""
    count = len(qdata)
    if not count or len(scale) != count or any(t and len(t) != count for t in (zero_point, bias, act_pre_scale)):
        raise RuntimeError(
            f"linear_many: {count} weights have {len(scale)} scales, {len(zero_point or ())} zero points, "
            f"{len(bias or ())} biases and {len(act_pre_scale or ())} act_pre_scales"
        )
    none: list[Tensor | None] = [None] * count
    weights, left = [], list(meta or ())
    for i, (q, s, z) in enumerate(zip(qdata, scale, zero_point or none, strict=True)):
        own = 2 * (s.dtype == torch.uint8) + 2 * (z is not None and z.dtype == torch.uint8)
        if i == count - 1:
            own = max(own, len(left))  # what is left over is an error
        weights.append(PackedWeight(q, s, z, left[:own], nbits, format, group_size, axis, in_features))
        left = left[own:]
    return x, weights, list(bias or none), activation, list(act_pre_scale or none)


def join_many(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], activation: str,
    act_pre_scales: Sequence[Tensor | None] = (None,),
) -> tuple[Any, ...]:  # fmt: skip
    """The reverse of ``split_many``: the arguments of the schema."""
    first = weights[0]
    zeros = None if first.zero_point is None else [w.zero_point for w in weights]
    meta = [t for w in weights for t in w.meta or ()]
    bias = None if biases[0] is None else list(biases)
    pre = None if act_pre_scales[0] is None else list(act_pre_scales)
    lists = ([w.qdata for w in weights], [w.scale for w in weights], zeros, bias)
    return (x, *lists, *first[4:], activation, meta or None, pre)


def _one_by_one(*args: Any) -> Tensor:
    x, weights, biases, activation, pre = split_many(*args)
    checks.linear_many(x, weights, biases, activation, pre)
    each = zip(weights, biases, pre, strict=True)
    return torch.cat([OPS.registry_linear(*flat("linear", (x, w, b, s, activation))) for w, b, s in each], -1)


def _fake_many(*args: Any) -> Tensor:
    x, weights, *rest = split_many(*args)
    checks.linear_many(x, weights, *rest)
    return x.new_empty(*x.shape[:-1], sum(w.qdata.shape[-2] for w in weights))


for _name in ("linear_many", "registry_linear_many", "_linear_many"):
    define(_name, _MANY, remembered(_one_by_one), _fake_many)

# Autograd passes over what has no gradient of its own: torch's fallback, which warns of that, costs at each call.
for _op in (*PRODUCTS, "linear_many"):
    for _name in (f"_{_op}", f"registry_{_op}"):
        LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
