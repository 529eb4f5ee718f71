"""Seeing the products that eager code asks for, for as long as somebody looks; calls cost nothing more otherwise."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hqqtensor import ops
from hqqtensor.ops.backend import served

Observer = Callable[[str, tuple[Any, ...], str | None], None]
"""Called after a product with the operator's name, the arguments of the function in ``hqqtensor.ops`` of that name, and
the backend that the registry chose, None where the compiled kernels served without asking it."""

OBSERVED = ("linear", "linear_many", "batched_linear", "grouped_linear", "embedding", "dequantize", "dequantize_into")
_lock = threading.Lock()
_observers: list[Observer] = []
_functions: dict[str, Callable[..., Any]] = {}


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of the products of all threads within the block.

    The functions of ``hqqtensor.ops`` are exchanged for that time. Not seen are products within compiled graphs and
    those of decoders (``ops.decoder``), which call none of them.
    """
    with _lock:
        if not _observers:
            for name in OBSERVED:
                _functions[name] = getattr(ops, name)
                setattr(ops, name, _observing(name, _functions[name]))
        _observers.append(observer)
    try:
        yield
    finally:
        with _lock:
            _observers.remove(observer)
            if not _observers:
                for name, function in _functions.items():
                    setattr(ops, name, function)


def _observing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        served.name = None
        out = function(*args, **kwargs)
        backend = served.name
        for observer in tuple(_observers):
            observer(name, args, backend)
        return out

    return call
