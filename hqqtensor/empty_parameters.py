"""Building a model whose parameters have no numbers, while other threads build theirs with numbers.

accelerate's ``init_empty_weights`` and transformers' ``no_init_weights`` change classes and functions of torch for the
whole process, so that a layer which another thread makes meanwhile has no numbers either. What is used here holds for
the thread that asks.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_SKIPPED = frozenset({"constant_", "fill_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "zero_"})


class _Thread(threading.local):
    is_building = False


_thread = _Thread()


def _without_numbers(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not _thread.is_building or parameter.is_meta:
        return None
    empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


# Torch calls it for every parameter of every module in the process. It is never removed: adding and removing hooks
# while another thread goes through them is an error there.
register_module_parameter_registration_hook(_without_numbers)  # type: ignore[arg-type]  # it may return one


class _NoInitialization(TorchFunctionMode):
    """Leaves out what only writes numbers to tensors that hold none.

    transformers asks by an empty tensor where a model is built, and initializes none on the meta device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _SKIPPED:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if getattr(tensor, "is_meta", False):
                return tensor
        if func is torch.tensor and isinstance(args[0] if args else None, list) and not args[0] and not kwargs:
            return torch.empty(0, device="meta")
        return func(*args, **(kwargs or {}))


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters of modules that this thread builds within the block go to the meta device as they are registered.

    Their initialization is left out. Buffers are computed as ever.
    """
    before, _thread.is_building = _thread.is_building, True
    try:
        with _NoInitialization():
            yield
    finally:
        _thread.is_building = before
