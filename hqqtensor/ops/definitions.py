"""The torch.library operators and their fake kernels.

``hqqtensor::linear`` and the others have C++ kernels for CPU tensors where the extension is built. Everywhere else, and
where those kernels do not serve (a backend chosen by hand, another format), ``hqqtensor::registry_linear`` asks the
backend registry when it runs, so a compiled graph follows ``set_backend`` as eager code does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hqqtensor.ops import reference as reference  # registers the plain backend
from hqqtensor.ops.backend import kernel

_WEIGHT = "Tensor qdata, Tensor scale, Tensor? zero_point"
_SETTINGS = "Tensor[] meta, int nbits, str format, int group_size, int axis, int in_features"
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
"""Arguments of each operator. qdata, scale and zero_point as in ``HQQTensor``, and settings.

A uint8 scale is itself quantized along its rows, in 8 bits or, where its rows have ``meta_bytes(columns, 4)`` bytes, in
4 (``hqqtensor.packing.pack_meta``): ``meta`` then begins with its own scale and zero point, in which row r uses row
r % rows; those of a uint8 zero point, in 8 or 4 bits as well, follow. ``activation`` is "float" or "int8" (see
``HqqConfig``).
"""

LIBRARY = torch.library.Library("hqqtensor", "DEF")


def _from_registry(op: str) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        return kernel(op, args[0].device.type)(*args)  # type: ignore[attr-defined]

    return run


def _fake_dequantize(qdata, scale, zero_point, meta, nbits, format, group_size, axis, in_features, dtype):  # type: ignore[no-untyped-def]
    return qdata.new_empty(*qdata.shape[:-1], in_features, dtype=dtype)


def _fake_linear(x, qdata, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


def _fake_grouped(x, offsets, qdata, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], qdata.shape[-2])


def _fake_embedding(indices, qdata, scale, zero_point, meta, nbits, format, group_size, axis, in_features, dtype):  # type: ignore[no-untyped-def]
    return qdata.new_empty(*indices.shape, in_features, dtype=dtype)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "dequantize": _fake_dequantize,
    "linear": _fake_linear,
    "batched_linear": _fake_linear,
    "grouped_linear": _fake_grouped,
    "embedding": _fake_embedding,
}
for _op, _schema in SCHEMAS.items():
    for _name in (_op, f"registry_{_op}"):
        LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(_name, _from_registry(_op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"hqqtensor::{_name}", _FAKES[_op], lib=LIBRARY)


def _into(out: Tensor, *args: object) -> None:
    out.copy_(dequantize(*args, out.dtype))


# dequantize, written into out [..., N, K] of any floating dtype, whose last dimension has stride 1 (the others any). No
# backend needs a kernel of its own for it: the compiled ones for the CPU have one, the others' results are copied.
for _name in ("dequantize_into", "registry_dequantize_into"):
    LIBRARY.define(f"{_name}(Tensor(a!) out, {_WEIGHT}, {_SETTINGS}) -> ()", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(_name, _into, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hqqtensor::{_name}", lambda *args: None, lib=LIBRARY)

# x [..., K] times the transposes of several weights packed alike, [N_i, K], beside each other: [..., sum of N_i]. No
# zero_point where the format has none, a bias for every weight or for none.
LIBRARY.define(
    "linear_many(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, Tensor[] bias, int nbits, str format, "
    "int group_size, int axis, int in_features, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _one_by_one(x, qdata, scale, zero_point, bias, *settings):  # type: ignore[no-untyped-def]
    zeros, biases = zero_point or [None] * len(qdata), bias or [None] * len(qdata)
    weights = zip(qdata, scale, zeros, biases, strict=True)
    return torch.cat([linear(x, q, s, z, b, None, [], *settings) for q, s, z, b in weights], -1)


def _fake_many(x, qdata, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], sum(q.shape[-2] for q in qdata))


LIBRARY.impl("linear_many", _one_by_one, "CompositeExplicitAutograd")
torch.library.register_fake("hqqtensor::linear_many", _fake_many, lib=LIBRARY)

dequantize = torch.ops.hqqtensor.dequantize.default
dequantize_into = torch.ops.hqqtensor.dequantize_into.default
linear = torch.ops.hqqtensor.linear.default
linear_many = torch.ops.hqqtensor.linear_many.default
batched_linear = torch.ops.hqqtensor.batched_linear.default
grouped_linear = torch.ops.hqqtensor.grouped_linear.default
embedding = torch.ops.hqqtensor.embedding.default
