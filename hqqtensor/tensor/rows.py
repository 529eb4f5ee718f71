"""An HQQTensor by its first dimension: which of its data is cut along it, and what is shared by all rows.

Rows with scales of their own (axis 1) take them along. With axis 0, and for the second level of quantized scales, row n
uses scale n % G of all G. A shard that starts at row s then has the same G scales, rolled by s, so that its row 0 finds
its scale in place 0. Torch's distributed code cuts weights in this way: FSDP, DTensor and distributed checkpoints.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqqtensor.tensor import HQQTensor


class Cut(NamedTuple):
    """Names of the data of a weight by what cutting its first dimension does to them.

    along: has the rows as its own first dimension. cyclic: shared by rows in turn. whole: the same for all rows.
    """

    along: list[str]
    cyclic: list[str]
    whole: list[str]


def cut(w: HQQTensor) -> Cut:
    """NotImplementedError for a transposed matrix, whose first dimension lies within the packed rows."""
    lead = w.ndim > 1 + w.row_dims
    if w.transposed and not lead:
        raise NotImplementedError(
            f"a transposed weight cannot be cut along its first dimension, which is packed; cut its transpose: {w!r}"
        )
    out = Cut([], [], [])
    for name in w.__tensor_flatten__()[0]:
        if name == "act_pre_scale" or (name == "zero_point" and w.codebook == "tensor" and not lead):
            out.whole.append(name)
        elif name == "qdata" or lead or w.axis == 1 or (name == "zero_point" and w.codebook == "row"):
            out.along.append(name)
        else:
            out.cyclic.append(name)
    return out


def with_rows(
    w: HQQTensor, rows: int, along: Callable[[Tensor], Tensor], cyclic: Callable[[Tensor], Tensor] = lambda t: t
) -> HQQTensor:
    """``w`` with ``rows`` in its first dimension, and other data.

    along: from each plain tensor that has the rows as its first dimension to one with ``rows``. cyclic: from scales and
    zero points that rows share in turn to those of the new rows; it may get an HQQTensor.
    """
    names = cut(w)
    changes: dict[str, object] = {"shape": torch.Size([rows, *w.shape[1:]])}
    for name in names.along:
        part = getattr(w, name)
        changes[name] = with_rows(part, rows, along, cyclic) if isinstance(part, HQQTensor) else along(part)
    changes |= {name: cyclic(getattr(w, name)) for name in names.cyclic}
    if names.cyclic and w.axis == 0:  # with rows to fill it up there may be more rows to a scale than before
        changes["group_size"] = max(w.group_size, -(-rows // w.scale.shape[-2]))
    return w.with_data(**changes)


def parts_along(w: HQQTensor) -> list[Tensor]:
    """The plain tensors that have the rows as their first dimension, always in the same order."""
    parts = [getattr(w, name) for name in cut(w).along]
    return [t for part in parts for t in (parts_along(part) if isinstance(part, HQQTensor) else [part])]


def is_cyclic(w: HQQTensor) -> bool:
    """Whether rows share scales in turn, so that a shard has them in an order that depends on where it starts."""
    names = cut(w)
    parts = [getattr(w, name) for name in names.along]
    return bool(names.cyclic) or any(is_cyclic(part) for part in parts if isinstance(part, HQQTensor))


def rolled(part: Tensor, start: int) -> Tensor:
    """Shared scales ``[..., G, K]`` as rows have them that begin ``start`` rows later.

    NotImplementedError where they are quantized and share scales of their own in a way that cannot follow.
    """
    groups = part.shape[-2]
    if start % groups == 0:
        return part
    if not isinstance(part, HQQTensor):
        return torch.roll(part, -start, -2)
    if groups % part.scale.shape[-2]:
        raise NotImplementedError(
            f"rows that share {groups} quantized scales can be cut at multiples of {groups}, got {start}; use axis=1, "
            "or quant_scale=False and quant_zero=False"
        )
    data = {name: torch.roll(getattr(part, name), -start, -2) for name in part.__tensor_flatten__()[0]}
    return part.with_data(**data)


def padded_rows(w: HQQTensor) -> int:
    """The rows that every shard of a weight has memory for; more than ``w`` has where it is a short last shard.

    FSDP copies a shard into a new tensor of that length and keeps a view of its first rows. So all parts begin where
    their memory does, and the memory of each has the same number of rows. A copy on another device notes it.
    """
    if w.shard_rows is not None:
        return w.shard_rows
    lengths = set()
    for part in parts_along(w):
        row = part.new_empty(1, *part.shape[1:]).nbytes
        memory = part.untyped_storage().nbytes()
        lengths.add(memory // row if part.storage_offset() == 0 and row and memory % row == 0 else 0)
    return max(w.shape[0], *lengths) if len(lengths) == 1 else w.shape[0]


def zeros(w: HQQTensor, rows: int, **options: Any) -> HQQTensor:
    """A weight of zeros with the settings of ``w`` and ``rows`` rows: all scales are zero. options: as of new_zeros."""

    def blank(t: Tensor) -> Tensor:
        if isinstance(t, HQQTensor):
            return t.with_data(**{name: blank(getattr(t, name)) for name in t.__tensor_flatten__()[0]})
        return t.new_zeros(t.shape, **options)

    names = cut(w)
    moved = w.with_data(**{name: getattr(w, name).to(**options) for name in names.whole}) if options else w
    return with_rows(moved, rows, lambda t: t.new_zeros(rows, *t.shape[1:], **options), blank)


def plain_parts(w: HQQTensor) -> list[Tensor]:
    """All data as plain tensors, in an order that weights of equal settings share."""
    parts = [getattr(w, name) for name in w.__tensor_flatten__()[0]]
    return [t for part in parts for t in (plain_parts(part) if isinstance(part, HQQTensor) else [part])]
