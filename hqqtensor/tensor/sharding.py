# mypy: disable-error-code="no-untyped-def"
"""What torch's FSDP2 (``fully_shard``), DTensor and distributed checkpoints ask of an HQQTensor.

FSDP cuts a weight along its first dimension, fills the last shards up to equal length, and calls the two hooks here
around each all-gather, in which packed bytes travel. DTensor cuts, scatters and gathers with the operators below.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.rows import cut, is_cyclic, padded_rows, parts_along, plain_parts, rolled, with_rows, zeros

aten, functional = torch.ops.aten, torch.ops._c10d_functional
implements = HQQTensor.implements


def _filled(part: Tensor, rows: int) -> Tensor:
    """``part`` with zeros behind its rows."""
    return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])]) if len(part) < rows else part


def _fsdp_pre_all_gather(self: HQQTensor, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
    """What FSDP gathers, packed bytes and scales of as many rows as the longest shard has, and what
    ``fsdp_post_all_gather`` needs beside them.

    FSDP's longer signature would tell the number of rows, but asks that what is sent has the shape of the weight.
    """
    rows = padded_rows(self)
    parts = (
        torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) if len(t) < rows else t for t in parts_along(self)
    )
    return tuple(t.contiguous() for t in parts), (self, mesh.get_local_rank() * rows)


def _fsdp_post_all_gather(
    self: HQQTensor, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *,
    out: Tensor | None = None,
) -> Any:  # fmt: skip
    """The weight over the gathered bytes, presenting ``param_dtype``. FSDP cuts off the rows that fill up the shards.

    out: the weight of an earlier call, in whose memory the bytes lie; it gets what all rows share, which may have
    changed since.
    """
    local, start = metadata
    if alone := len(all_gather_outputs) < len(parts_along(local)):
        whole = local  # of one process: FSDP sends nothing, and hands over the first part only
    else:
        outputs = iter(all_gather_outputs)
        rows = all_gather_outputs[0].shape[0]
        whole = with_rows(local, rows, lambda _: next(outputs), lambda t: rolled(t, -start))
    if out is None:
        return whole.with_data(dtype=param_dtype), ()
    _share(whole, out, alone)
    return None


def _share(source: HQQTensor, to: Any, rows: bool) -> None:
    """Give ``to`` what all rows of ``source`` share, and its rows too where ``rows`` says so."""
    names = cut(source)
    for name in (*names.cyclic, *names.whole, *(names.along if rows else ())):
        setattr(to, name, getattr(source, name))
    for name in () if rows else names.along:
        if isinstance(part := getattr(source, name), HQQTensor):
            _share(part, getattr(to, name), rows)


HQQTensor.fsdp_pre_all_gather = _fsdp_pre_all_gather  # type: ignore[attr-defined]
HQQTensor.fsdp_post_all_gather = _fsdp_post_all_gather  # type: ignore[attr-defined]


def _rows_of(w: HQQTensor, size: Any, what: str) -> int:
    """The length of the first dimension of ``size``, where the others are those of ``w``."""
    if len(size) != w.ndim or list(size[1:]) != list(w.shape[1:]):
        raise NotImplementedError(
            f"{what}: a quantized weight can have another length in its first dimension only (shard it with Shard(0)), "
            f"got {list(size)} for {w!r}"
        )
    return size[0]


@implements([aten.new_zeros.default, aten.new_empty.default])
def _(func, types, args, kwargs):
    self, size = args
    if list(size) == [0]:
        # FSDP makes the shards of ranks for which no rows are left in this way, on all ranks.
        if is_cyclic(self):
            raise NotImplementedError(
                f"there are more processes than shards of rows, which share scales: {self!r}. Leave it out of what is "
                "sharded (ignored_params), or quantize with axis=1, quant_scale=False, quant_zero=False"
            )
        return torch.empty(0, dtype=self.dtype, device=self.device)
    rows = _rows_of(self, size, "new_zeros")
    out = zeros(self, rows, **({"device": kwargs["device"]} if kwargs.get("device") else {}))
    return out.with_data(dtype=kwargs["dtype"]) if kwargs.get("dtype") else out


@implements([aten.constant_pad_nd.default])
def _(func, types, args, kwargs):
    self, pad = args[:2]
    *others, extra = pad if len(pad) == 2 * self.ndim else (*pad, 0)
    value = args[2] if len(args) > 2 else 0
    if any(others) or extra < 0 or value != 0 or is_cyclic(self):
        raise NotImplementedError(
            f"pad: zeros can be put behind the rows of a quantized weight (axis=1, plain scales), got {list(pad)} for "
            f"{self!r}. To shard it evenly, use a number of processes that divides {list(self.shape)}"
        )
    rows = self.shape[0] + extra
    return with_rows(self, rows, lambda t: _filled(t, rows))


@implements([aten.as_strided.default])
def _(func, types, args, kwargs):
    self, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else 0
    rows = _rows_of(self, size, "as_strided")
    if list(stride) != list(torch.empty(size, device="meta").stride()) or offset or rows > self.shape[0]:
        raise NotImplementedError(
            f"as_strided: only the first rows of a quantized weight, got {size} {stride} {offset}"
        )
    return return_and_correct_aliasing(func, args, kwargs, aten.slice.Tensor(self, 0, 0, rows))


@implements([functional.wait_tensor.default, functional._wrap_tensor_autograd.default])
def _(func, types, args, kwargs):
    """Nothing is left to wait for: what gathers a weight waits for its parts."""
    return args[0]


@implements([functional.all_gather_into_tensor.default])
def _(func, types, args, kwargs):
    """The rows of all processes below one another."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    self, processes, group = args
    rows, rank = self.shape[0], _resolve_process_group(group).rank()

    def gathered(part: Tensor) -> Tensor:
        return functional.wait_tensor(func(part.contiguous(), processes, group))

    def same(part: Tensor) -> Tensor:
        """``part``, if it is the same on all processes."""
        for plain in plain_parts(part) if isinstance(part, HQQTensor) else [part]:
            copies = gathered(plain).view(torch.uint8).view(processes, -1)
            if not torch.equal(copies, copies[:1].expand_as(copies)):
                raise NotImplementedError(
                    "all_gather: shards of in_features have scales (axis=0) or column scales of their own, which one "
                    f"weight of all their rows cannot have: {self!r}. Gather its dequantize(), or its parts one by one"
                )
        return part

    whole = {name: same(getattr(self, name)) for name in cut(self).whole}
    out = with_rows(self, processes * rows, gathered, lambda part: same(rolled(part, -rank * rows)))
    return out.with_data(**whole)
