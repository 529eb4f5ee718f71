# mypy: disable-error-code="no-untyped-def"
"""What moves, copies, compares and shares an HQQTensor's data as a whole."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.rows import padded_rows, rolled

aten = torch.ops.aten
implements = HQQTensor.implements
implements_torch_function = HQQTensor.implements_torch_function


@implements([aten._to_copy.default])
def _(func, types, args, kwargs):
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    if not to["dtype"].is_floating_point:
        raise TypeError(f"to: an HQQTensor presents a floating dtype, got {to['dtype']}")
    moved = _moved(self, {"device": to["device"], "non_blocking": to["non_blocking"]}).with_data(dtype=to["dtype"])
    if not self.transposed and (rows := padded_rows(self)) > self.shape[0]:
        moved.shard_rows = rows
    return return_and_correct_aliasing(func, args, kwargs, moved)


def _moved(self: HQQTensor, where) -> HQQTensor:
    """All data moved; quantized scales by their parts, as torchao's own ``to`` does not leave a device."""
    parts = {n: getattr(self, n) for n in self.__tensor_flatten__()[0]}
    return self.with_data(
        **{n: _moved(t, where) if isinstance(t, HQQTensor) else t.to(**where) for n, t in parts.items()}
    )


_base_alias = HQQTensor._ATEN_OP_TABLE[HQQTensor][aten.detach.default]


@implements([aten.detach.default, aten.alias.default])
def _(func, types, args, kwargs):
    out = _base_alias(func, types, args, kwargs)
    out.rolled_from, out.shard_rows = args[0].rolled_from, args[0].shard_rows
    return out


_base_copy = HQQTensor._ATEN_OP_TABLE[HQQTensor][aten.copy_.default]


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    self, src = args[0], args[1]
    if not isinstance(self, HQQTensor):
        self.copy_(src.dequantize())
        return self
    if not isinstance(src, HQQTensor):
        raise TypeError(f"copy_: a dense {list(src.shape)} tensor cannot be copied into {self!r}; quantize it first")
    if src.dtype != self.dtype:  # as for dense tensors: the numbers come, the dtype stays
        src = src.with_data(dtype=self.dtype)
    _base_copy(func, types, (self, src), kwargs)
    if self.rolled_from:
        shared, start = self.rolled_from
        for name, part in shared.items():
            part.copy_(rolled(getattr(src, name), -start))
    return self


@implements([aten.equal.default])
def _(func, types, args, kwargs):
    a, b = args
    if not (isinstance(a, HQQTensor) and isinstance(b, HQQTensor)):
        return False
    (names, attributes), (names_b, attributes_b) = a.__tensor_flatten__(), b.__tensor_flatten__()
    if names != names_b or attributes != attributes_b or a.qdata.dtype != b.qdata.dtype:
        return False
    # As bytes: a floating view of packed codes holds NaN patterns, which never compare equal.
    same_codes = torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
    return same_codes and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names if n != "qdata")


@implements([aten.empty_like.default])
def _(func, types, args, kwargs):
    return args[0].with_data(**{n: torch.empty_like(getattr(args[0], n)) for n in args[0].__tensor_flatten__()[0]})


@implements([aten._pin_memory.default])
def _(func, types, args, kwargs):
    return args[0].with_data(**{n: getattr(args[0], n).pin_memory() for n in args[0].__tensor_flatten__()[0]})


@implements([aten.is_pinned.default])
def _(func, types, args, kwargs):
    return all(getattr(args[0], n).is_pinned() for n in args[0].__tensor_flatten__()[0])


@implements_torch_function([Tensor.data_ptr])
def _(func, types, args, kwargs):
    """Where the codes lie: by this others tell whether two weights are one (the subclass itself has no memory)."""
    return args[0].qdata.data_ptr()


@implements_torch_function([Tensor.share_memory_])
def _(func, types, args, kwargs):
    for name in args[0].__tensor_flatten__()[0]:
        getattr(args[0], name).share_memory_()
    return args[0]


@implements_torch_function([Tensor.is_shared])
def _(func, types, args, kwargs):
    return all(getattr(args[0], n).is_shared() for n in args[0].__tensor_flatten__()[0])
