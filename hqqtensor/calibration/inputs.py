"""Watching the inputs of layers while batches run through a model."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Enough(Exception):
    """All inputs that were asked for have been seen; the rest of the forward pass is not needed."""


@torch.no_grad()
def watch(
    model: nn.Module,
    names: Iterable[str],
    batches: list[Any],
    note: Callable[[str, Tensor], None],
    stop: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Run ``batches`` and call ``note(name, x)`` with the input x ``[tokens, K]`` of each module of ``names``.

    Padding is left out: where a batch has an ``attention_mask`` ``[B, S]`` and an input is ``[B, S, K]``, the rows with
    mask 0 are not given. ``stop`` ends each pass once every module has been seen. The model is in eval mode meanwhile.
    """
    wanted = set(names)
    seen: set[str] = set()
    mask: Tensor | None = None

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str) -> None:
        x = args[0] if args else kwargs["input"]
        x = x.detach()
        x = x[mask] if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2] else x.flatten(0, -2)
        note(name, x)
        seen.add(name)
        if stop and seen == wanted:
            raise _Enough

    handles = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(hook, name=name), with_kwargs=True)
        for name in wanted
    ]
    training = model.training
    model.eval()
    try:
        for done, batch in enumerate(batches, 1):
            seen.clear()
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = given.bool() if isinstance(given, Tensor) else None
            with contextlib.suppress(_Enough):
                run(model, batch)
            if progress is not None:
                progress(done, len(batches), "calibrating")
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones, else one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
