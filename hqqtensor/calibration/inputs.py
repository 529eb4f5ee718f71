"""The inputs of layers while batches run through a model."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.forward import evaluating, run
from hqqtensor.half_products import fast_half_products


class _AllSeen(Exception):
    """Ends a forward pass early: every watched module has had its input."""


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x [..., K]`` as rows ``[tokens, K]``, without those that ``mask``, bool ``[B, S]``, hides.

    It hides rows of ``[B, S, K]`` and of ``[B * S, K]``, as experts are given their inputs.
    """
    rows = x.flatten(0, -2)
    hides = mask is not None and (mask.shape == x.shape[:-1] or (x.ndim == 2 and mask.numel() == len(x)))
    return rows[mask.flatten()] if hides and mask is not None else rows


class _InputRows:
    """Turns inputs of layers into rows ``[tokens, K]`` without padding, once for layers called on the same input."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask  # bool [B, S]
        self.last_input: Tensor | None = None  # held, so that no other input can take its address
        self.last_version = 0
        self.rows: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The rows of ``x [..., K]``; where ``x`` is the input of the last call, the tensor that was returned then."""
        # The version differs where the input was changed in place since. Inference tensors have none, but nothing can
        # change them outside of inference mode.
        version = 0 if x.is_inference() else x._version
        if self.rows is None or not self._is_last(x) or version != self.last_version:
            self.last_input, self.last_version = x, version
            self.rows = unpadded(x, self.mask)
        return self.rows

    def _is_last(self, x: Tensor) -> bool:
        last = self.last_input
        return last is not None and (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) == (
            last.data_ptr(), last.shape, last.stride(), last.dtype, last.device
        )  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One run of a batch through a model, or through a part of it. mask: bool ``[B, S]``, False for padding."""

    run: Callable[[], Any]
    mask: Tensor | None


def mask_of(batch: Any) -> Tensor | None:
    """The ``attention_mask`` ``[B, S]`` of a batch as booleans, where it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) else None


def whole_passes(model: nn.Module, batches: Iterable[Any]) -> list[Pass]:
    """A pass through ``model`` for each batch."""
    return [Pass(functools.partial(run, model, batch), mask_of(batch)) for batch in batches]


@torch.inference_mode(False)
@torch.no_grad()
def watch(
    model: nn.Module,
    names: Iterable[str],
    passes: Sequence[Pass],
    observe: Callable[[str, Tensor], None] = lambda _name, _rows: None,
    stop: bool = False,
    calls: Mapping[str, Callable[[tuple[Any, ...], dict[str, Any], Tensor | None], None]] | None = None,
) -> None:
    """Make ``passes`` and call ``observe(name, rows)`` with the inputs ``[tokens, K]`` of each module of ``names``.

    Padding is left out: where a pass has a mask ``[B, S]`` and an input is ``[B, S, K]``, the rows that are False are
    not given. Modules called one right after the other on the same input (query, key and value) are given the same
    ``rows`` object. ``stop`` ends each pass once every module has been seen. The model is in eval mode meanwhile;
    afterwards every module has the mode that it had.

    calls: for modules by name, what is called instead with the arguments of each call of theirs and the pass's mask.
    """
    calls = calls or {}
    wanted = {*names, *calls}
    seen: set[str] = set()
    inputs = _InputRows(None)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str) -> None:
        if name in calls:
            calls[name](args, kwargs, inputs.mask)
        else:
            observe(name, inputs.of((args[0] if args else kwargs["input"]).detach()))
        seen.add(name)
        if stop and seen == wanted:
            raise _AllSeen

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(fast_half_products())
        for name in wanted:
            module, module_hook = model.get_submodule(name), functools.partial(hook, name=name)
            stack.callback(module.register_forward_pre_hook(module_hook, with_kwargs=True).remove)
        for one in passes:
            seen.clear()
            inputs = _InputRows(one.mask)
            with contextlib.suppress(_AllSeen):
                one.run()
