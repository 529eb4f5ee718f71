# mypy: disable-error-code="no-untyped-def"
"""Quantized weights as one flat tensor, in the few ways in which torch's DDP and FSDP take one.

DDP makes one flat tensor of a bucket of parameters, broadcasts it, cuts it into the parameters again and copies them
back. FSDP keeps ``weight.view(-1)`` beside a weight. A flat tensor here is a list of the tensors, with no data beside
theirs.
"""

from typing import Any

import torch
from torch import Tensor

from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.rows import plain_parts

aten, c10d = torch.ops.aten, torch.ops.c10d


class FlatTensors(Tensor):
    """One dimension with the numbers of ``members``, quantized weights and flat dense tensors.

    NotImplementedError from all torch functions but those that the module names.
    """

    members: list[Tensor]

    @staticmethod
    def __new__(cls, members: list[Tensor]) -> "FlatTensors":
        length, head = sum(member.numel() for member in members), members[0]
        make = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        out = make(cls, (length,), dtype=head.dtype, device=head.device)
        out.members = members
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        implementation = _OPERATIONS.get(func)
        if implementation is None:
            raise NotImplementedError(f"{func} is not offered for view(-1) of quantized weights; dequantize() first")
        return implementation(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatTensors({self.members!r})"


def _cat(func, tensors, dim=0):
    return FlatTensors([member for t in tensors for member in (t.members if isinstance(t, FlatTensors) else [t])])


def _slice(func, flat, dim=0, start=None, end=None, step=1):
    """The members that lie from ``start`` to ``end``, which must be whole ones."""
    first, last, _ = slice(start, end, step).indices(flat.shape[0])
    at, inside = 0, []
    for member in flat.members:
        if first <= at and at + member.numel() <= last and member.numel():
            inside.append(member)
        at += member.numel()
    if step != 1 or not inside or sum(member.numel() for member in inside) != last - first:
        raise NotImplementedError(f"slice: {start}:{end} of flat quantized weights is no number of whole weights")
    return FlatTensors(inside)


def _view(func, flat, size):
    member = flat.members[0]
    if len(flat.members) == 1 and (list(size) == list(member.shape) or not isinstance(member, HQQTensor)):
        return member.view(size)
    if list(size) in ([-1], [flat.shape[0]]):
        return _detach(func, flat)
    raise NotImplementedError(f"view: flat quantized weights can have the shape of one weight only, not {size}")


def _detach(func, flat):
    return FlatTensors(list(flat.members))


def _parts(t: Tensor) -> list[Tensor]:
    """The plain tensors of a flat tensor, of a weight, or of a plain tensor itself."""
    if isinstance(t, FlatTensors):
        return [part for member in t.members for part in _parts(member)]
    if isinstance(t, HQQTensor) and t.rolled_from:
        raise NotImplementedError(
            f"communication: rows that share scales are sent as a copy; clone() them first: {t!r}"
        )
    return plain_parts(t) if isinstance(t, HQQTensor) else [t]


def _broadcast(func, tensors, group, root, root_tensor=0, async_op=True, timeout=-1):
    """A broadcast for each part; the work that is returned is the last one's, when the others have ended."""
    work = None
    for part in [part for t in tensors for part in _parts(t)]:
        if work is not None:
            work.wait()
        _, work = func([part], group, root, 0, async_op, timeout)
    return tensors, work


def _scatter(func, outputs, inputs, group, root, async_op=True, timeout=-1):
    parts = _parts(outputs[0])
    lists = zip(*map(_parts, inputs[0]), strict=True) if inputs and inputs[0] else [()] * len(parts)
    work = None
    for part, pieces in zip(parts, lists, strict=True):
        if work is not None:
            work.wait()
        _, work = func([part], [[p.contiguous() for p in pieces]] if pieces else [], group, root, async_op, timeout)
    return outputs, work


_COLLECTIVES: dict[Any, Any] = {c10d.broadcast_.default: _broadcast, c10d.scatter_.default: _scatter}
_OPERATIONS: dict[Any, Any] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    **_COLLECTIVES,
}


@HQQTensor.implements([*_COLLECTIVES])
def _(func, types, args, kwargs):
    return _COLLECTIVES[func](func, *args, **(kwargs or {}))
