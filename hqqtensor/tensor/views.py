# mypy: disable-error-code="no-untyped-def"
"""Views and joins of an HQQTensor: transpose, slice, split, select, cat, view."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from hqqtensor.packing import BLOCK, byte_offset
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.flat import FlatTensors
from hqqtensor.tensor.rows import rolled

aten = torch.ops.aten
implements = HQQTensor.implements


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    self, *dims = args
    ndim = self.ndim
    order = list(range(ndim))
    if func is aten.permute.default:
        order = [d % ndim for d in dims[0]]
    else:
        first, second = dims or (0, 1)
        order[first], order[second] = order[second], order[first]
    if order == list(range(ndim)):
        new = self.with_data()
    elif self.row_dims > 1:
        raise NotImplementedError("transpose: the weight of a convolution stays as it is; dequantize() first")
    elif order != [*range(ndim - 2), ndim - 1, ndim - 2]:
        raise NotImplementedError(
            f"transpose: only the last two dimensions of an HQQTensor can be swapped, got the order {order}"
        )
    else:
        shape = torch.Size([*self.shape[:-2], self.shape[-1], self.shape[-2]])
        new = self.with_data(shape=shape, transposed=not self.transposed)
    return return_and_correct_aliasing(func, args, kwargs, new)


def _sliced_with(self: HQQTensor, rows: bool) -> list[str]:
    """Names of the data to slice together with ``qdata`` by row, or by column. A codebook is sliced by row only if
    every row has its own entries."""
    if self.codebook is not None:
        return ["scale", "zero_point"] if rows and self.codebook == "row" else ["scale"]
    return ["scale"] if self.zero_point is None else ["scale", "zero_point"]


def _stored(self: HQQTensor) -> list[str]:
    """All data that has the leading dimensions."""
    return ["qdata", "scale"] if self.zero_point is None else ["qdata", "scale", "zero_point"]


def _cut(self: HQQTensor, dim: int, start: int, end: int) -> HQQTensor:
    """The view ``[start, end)`` of one dimension; raises NotImplementedError where that is no view."""
    if start == end:  # nothing can be cut off anywhere
        start = end = 0
    shape = list(self.shape)
    shape[dim] = end - start
    lead = self.ndim - 1 - self.row_dims
    stored = dim if dim < lead or not self.transposed else 2 * lead + 1 - dim
    if start == 0 and end == self.shape[dim]:
        return aten.alias.default(self)
    if stored > lead and self.row_dims > 1:
        raise NotImplementedError("slice: the weight of a convolution can be cut along its first dimension only")
    act, piece, origin = self.act_pre_scale, aten.slice.Tensor, self.rolled_from
    if stored < lead:
        data = {n: piece(getattr(self, n), stored, start, end) for n in _stored(self)}
    elif stored == lead:
        data = {"qdata": piece(self.qdata, stored, start, end)}
        if self.axis == 1:
            data |= {n: piece(getattr(self, n), stored, start, end) for n in _sliced_with(self, rows=True)}
        else:
            names = _sliced_with(self, rows=False)
            data |= {n: rolled(getattr(self, n), start) for n in names}
            if self.rolled_from or start % self.scale.shape[-2]:
                shared, before = self.rolled_from or ({n: getattr(self, n) for n in names}, 0)
                origin = shared, before + start
    else:
        K, size = self.in_features, self.group_size
        first, last = byte_offset(start, K, self.nbits), byte_offset(end, K, self.nbits)
        whole = start % size == 0 and (end % size == 0 or end == K)
        inside = start // size == (end - 1) // size
        if first is None or last is None or (self.axis == 1 and not whole and not inside):
            raise NotImplementedError(
                f"slice: in_features can be cut at multiples of {BLOCK} that are group boundaries "
                f"(group_size {size}), got {start}:{end} of {K}"
            )
        item = self.qdata.element_size()
        if first % item or last % item:
            raise NotImplementedError(f"slice: {start}:{end} is no whole number of {self.qdata.dtype} in qdata")
        data = {"qdata": piece(self.qdata, stored, first // item, last // item)}
        low, high = (start, end) if self.axis == 0 else (start // size, -(-end // size))
        names = _sliced_with(self, rows=False)
        data |= {n: _columns(getattr(self, n), stored, low, high) for n in names}
        if origin:
            origin = {n: _columns(origin[0][n], stored, low, high) for n in names}, origin[1]
        if self.rotation and (start % self.rotation or end % self.rotation):
            raise NotImplementedError(
                f"slice: in_features are rotated in blocks of {self.rotation} and can be cut between them, "
                f"got {start}:{end} of {K}"
            )
        act = None if act is None else act[start:end]
    out = self.with_data(**data, shape=torch.Size(shape), act_pre_scale=act)
    out.rolled_from = origin
    return out


def _columns(part: Tensor, dim: int, start: int, end: int) -> Tensor:
    """Scales or zero points of some columns. Quantized ones of 8 bits are a byte each and can be cut anywhere."""
    if not isinstance(part, HQQTensor):
        return aten.slice.Tensor(part, dim, start, end)
    columns = part.in_features
    if part.nbits != 8 and (start % BLOCK or (end % BLOCK and end != columns)):
        raise NotImplementedError(
            f"slice: scales quantized to {part.nbits} bits can be cut at multiples of {BLOCK} groups, got "
            f"{start}:{end} of {columns}; those of 8 bits (meta_nbits=8) anywhere"
        )
    if part.nbits != 8:
        return aten.slice.Tensor(part, dim, start, end)
    data = {n: aten.slice.Tensor(getattr(part, n), dim, start, end) for n in _stored(part)}
    return part.with_data(**data, shape=torch.Size([*part.shape[:-1], end - start]))


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    if step != 1:
        raise NotImplementedError(f"slice: an HQQTensor is cut in steps of 1, got {step}")
    dim = dim % self.ndim
    length = self.shape[dim]
    start, end, _ = slice(start, end).indices(length)
    return return_and_correct_aliasing(func, args, kwargs, _cut(self, dim, start, max(start, end)))


@implements([aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default])
def _(func, types, args, kwargs):
    self, sizes, dim = fill_defaults(args, 3, [0])
    dim = dim % self.ndim
    length = self.shape[dim]
    if func is aten.chunk.default:
        sizes = -(-length // sizes) if length else [0] * sizes
    if isinstance(sizes, int):
        sizes = [min(sizes, length - first) for first in range(0, length, sizes)] if length else [0]
    if sum(sizes) != length:
        raise ValueError(f"split: sizes {list(sizes)} do not add up to the {length} of dimension {dim}")
    out, first = [], 0
    for size in sizes:
        out.append(_cut(self, dim, first, first + size))
        first += size
    return out


@implements([aten.select.int])
def _(func, types, args, kwargs):
    self, dim, index = args
    dim = dim % self.ndim
    if dim >= self.ndim - 1 - self.row_dims:
        raise NotImplementedError("select: only leading dimensions (experts) of an HQQTensor can be selected")
    data = {n: aten.select.int(getattr(self, n), dim, index) for n in _stored(self)}
    shape = torch.Size([s for d, s in enumerate(self.shape) if d != dim])
    return return_and_correct_aliasing(func, args, kwargs, self.with_data(**data, shape=shape))


@implements([aten.cat.default])
def _(func, types, args, kwargs):
    tensors, dim = fill_defaults(args, 2, [0])
    if not all(isinstance(t, HQQTensor) for t in tensors):
        raise NotImplementedError("cat: all tensors must be HQQTensors; dequantize() the quantized ones first")
    dim = dim % tensors[0].ndim
    _check_alike(tensors, dim)
    tensors = [t for t in tensors if t.shape[dim]] or tensors[:1]  # empty ones add nothing
    head = tensors[0]
    lead = head.ndim - 1 - head.row_dims
    stored = dim if dim < lead or not head.transposed else 2 * lead + 1 - dim
    if stored > lead and head.row_dims > 1:
        raise NotImplementedError("cat: weights of convolutions can be joined along their first dimension only")
    if stored == lead + 1:
        sizes = [t.in_features for t in tensors[:-1]]
        steps = (BLOCK, head.group_size if head.axis else 1, head.rotation or 1)
        bad = [size for size in sizes if any(size % step for step in steps)]
        if bad:
            raise NotImplementedError(f"cat: in_features must be multiples of {BLOCK} and the group size, got {bad}")
    data = {"qdata": torch.cat([t.qdata for t in tensors], stored)}
    for name in _stored(head)[1:]:
        parts = [getattr(t, name) for t in tensors]
        if name == "zero_point" and head.format == "codebook" and stored >= lead:
            data[name] = _join_codebooks(tensors, stored == lead and head.axis == 1)
        elif stored == lead and head.axis == 0:
            data[name] = _shared(tensors, parts)
        else:
            data[name] = torch.cat(parts, stored)
    shape = list(head.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    size = max(t.group_size for t in tensors)
    if stored == lead and head.axis == 0:  # more rows share a scale than in each of the joined weights
        size = max(size, -(-shape[dim] // head.scale.shape[-2]))
    return head.with_data(**data, shape=torch.Size(shape), group_size=size)


def _check_alike(tensors: list[HQQTensor], dim: int) -> None:
    """Raise where weights differ in more than the dimension along which they are to be joined."""
    head = tensors[0]
    names = {"nbits", "group_size", "axis", "dtype", "format", "transposed", "activation", "row_dims", "rotation"}
    if head.axis == 0:
        names.remove("group_size")  # row n belongs to group n % groups, and the scale has the number of groups
    for t in tensors[1:]:
        alike = all(getattr(t, n) == getattr(head, n) for n in names)
        fits = t.ndim == head.ndim and all(t.shape[d] == head.shape[d] for d in range(head.ndim) if d != dim)
        if not alike or not fits:
            raise ValueError(f"cat: tensors must be quantized alike, got {head!r} and {t!r}")
        if t.act_pre_scale is not None or head.act_pre_scale is not None:
            raise NotImplementedError("cat: tensors with act_pre_scale cannot be joined")


def _shared(tensors: list[HQQTensor], parts: list[Tensor]) -> Tensor:
    """The scales (or zero points) of rows that are joined with axis 0; raises where rows would change their group."""
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise NotImplementedError("cat: with axis=0 rows can be joined only where they share their scales")
    groups = parts[0].shape[-2]
    bad = [t.out_features for t in tensors[:-1] if t.out_features % groups]
    if bad:
        raise NotImplementedError(f"cat: with axis=0 rows can be joined at multiples of the {groups} groups, got {bad}")
    return parts[0]


def _join_codebooks(tensors: list[HQQTensor], rows: bool) -> Tensor:
    """The entries of joined weights: shared ones stay so, others go to each row where ``rows`` are joined."""
    entries = [t.zero_point for t in tensors if t.zero_point is not None]
    if all(torch.equal(entries[0], e) for e in entries[1:]) and (not rows or entries[0].shape[-2] == 1):
        return entries[0]
    if not rows:
        raise NotImplementedError("cat: weights with codebooks of their own can be joined along rows only (axis 1)")
    return torch.cat([e.expand(*e.shape[:-2], t.out_features, -1) for t, e in zip(tensors, entries, strict=True)], -2)


@implements([aten.view.default, aten._unsafe_view.default])
def _(func, types, args, kwargs):
    self, size = args
    same = list(size) == list(self.shape)
    if same or (-1 in size and torch.empty(self.shape, device="meta").view(size).shape == self.shape):
        return return_and_correct_aliasing(func, args, kwargs, self.with_data())
    if list(size) == [-1]:
        return FlatTensors([self])
    raise NotImplementedError(f"view: {list(self.shape)} as {list(size)} would need unpacking; dequantize() first")
