"""Running a user's model on batches, for calibration, search and diagnostics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter that has values: of an offloaded model some are on the meta device."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards, whatever ended it, every module has its own mode back.

    The flags are set one by one: ``model.train()`` would put modules into train mode that the user holds in eval mode,
    such as frozen batch norms, and a model's own ``train`` may do more than set flags (merge adapters, for one).
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model keeps no keys and values within the block; other models are left alone."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "use_cache"):
        yield
        return
    old, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = old


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones, else one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def comparable_output(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """What two models are compared by, float32: logits and True, or the last hidden states and False.

    ValueError for an output that has neither and is no tensor.
    """
    output = run(model, batch)
    has_logits = hasattr(output, "logits")
    result = output.logits if has_logits else getattr(output, "last_hidden_state", output)
    if not isinstance(result, Tensor):
        raise ValueError(f"{type(model).__name__} gives no logits or hidden states to compare")
    return result.to(torch.float32), has_logits
