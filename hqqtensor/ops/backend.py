"""The registry of backends and the choice among them.

A backend runs the ops on some kinds of device. ``auto`` takes the first available one, in order of
registration from the last, that serves the call; ``reference``, the plain path, serves all.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hqqtensor.ops.decoder import DecoderMaker
from hqqtensor.ops.encoder import Encoder
from hqqtensor.ops.packed import PackedWeight

ALIASES = {"dequantize": "reference"}
"""Former names of backends, which are still understood."""


@dataclass(frozen=True)
class Backend:
    """Kernels by op name ("linear", "batched_linear", "grouped_linear", "embedding", "dequantize"), and where they run.

    A kernel takes the arguments of ``hqqtensor.ops``'s function of that name, none left out, and gives its result, or
    NotImplemented for a format or a dtype that it does not serve. ``device_types`` None means every device.
    ``why_unavailable`` gives None, or the reason why the backend cannot run.
    ``encoder``: quantizes weights on those devices, where the backend can. ``decoder``: makes the decoder layers of a
    transformer one operator; RuntimeError for a shape that it does not serve.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]
    device_types: tuple[str, ...] | None = None
    why_unavailable: Callable[[], str | None] = field(default=lambda: None)
    encoder: Encoder | None = None
    decoder: DecoderMaker | None = None


@dataclass(frozen=True)
class BackendStatus:
    """One line of ``describe_backends``."""

    name: str
    available: bool
    reason: str | None
    device_types: tuple[str, ...] | None


class _Choice:
    """What a ``backend`` block chose. Tasks that start in the block copy its context, so a choice may outlive the
    block: it holds until the last context that has it is gone."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: str) -> None:
        self.name = name


class _Served(threading.local):
    """name: the backend that gave the result of the last call that came to ``run`` in this thread."""

    name: str | None = None


served = _Served()
_BACKENDS: dict[str, Backend] = {}
_default = "auto"
_local: ContextVar[_Choice | None] = ContextVar("hqqtensor_backend", default=None)
_lock = threading.RLock()  # a choice may be freed by a garbage collection within a locked line
_choices = 0  # that some context holds
_observers: list[Callable[[bool], None]] = []


def observe_choice(observer: Callable[[bool], None]) -> None:
    """Call ``observer(automatic)`` now and after each change. automatic: whether every call on a CPU, in any thread or
    task, may go to the compiled kernels without asking this registry."""
    _observers.append(observer)
    _tell_observers()


def _tell_observers() -> None:
    with _lock:
        compiled_first = _default == "cpu" or (_default == "auto" and _first("cpu") == "cpu")
        for observer in _observers:
            observer(compiled_first and _choices == 0)


def _first(device_type: str) -> str | None:
    """The backend that ``auto`` tries first on a device."""
    return next((b.name for b in reversed(_BACKENDS.values()) if _runs_on(b, device_type)), None)


def _runs_on(b: Backend, device_type: str) -> bool:
    return (b.device_types is None or device_type in b.device_types) and b.why_unavailable() is None


def register_backend(new: Backend) -> None:
    """Add a backend; a name that is taken, or "auto", raises ValueError."""
    if new.name in _BACKENDS or new.name == "auto" or new.name in ALIASES:
        raise ValueError(f"backend {new.name!r} is already registered")
    _BACKENDS[new.name] = new
    _tell_observers()


def describe_backends() -> list[BackendStatus]:
    """Every registered backend, whether it can run here, and why not."""
    reasons = [(b, b.why_unavailable()) for b in _BACKENDS.values()]
    return [BackendStatus(b.name, reason is None, reason, b.device_types) for b, reason in reasons]


def set_backend(name: str) -> None:
    """Choose the backend of the process; one that is unknown or cannot run here raises with the reason."""
    global _default
    _default = _checked(name)
    _tell_observers()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend within a ``with`` block, for this thread or asyncio task and for tasks started in the block;
    raises like ``set_backend``."""
    choice = _Choice(_checked(name))
    _count(1)
    weakref.finalize(choice, _count, -1).atexit = False
    token = _local.set(choice)
    del choice  # the context alone holds it
    try:
        yield
    finally:
        _local.reset(token)


def _count(change: int) -> None:
    global _choices
    with _lock:
        _choices += change
        _tell_observers()


def chosen() -> str:
    """The backend chosen here: "auto" or a name."""
    choice = _local.get()
    return _default if choice is None else choice.name


def run(op: str, device_type: str, args: Sequence[Any]) -> Tensor:
    """The result of the chosen backend's kernel of ``op``; RuntimeError where it has none for these arguments."""
    for candidate in candidates(op, device_type):
        out = candidate.kernels[op](*args)
        if out is not NotImplemented:
            served.name = candidate.name
            return out
    weight = next(a for a in args if isinstance(a, PackedWeight))
    dtype = args[-1] if isinstance(args[-1], torch.dtype) else args[0].dtype
    about = f"format {weight.format!r} of {weight.nbits} bits and {dtype}"
    raise RuntimeError(f"backend {chosen()!r} has no kernel for {op!r} with {about}")


def candidates(op: str, device_type: str) -> list[Backend]:
    """The backends to try for ``op`` on a device, the chosen one alone or all; RuntimeError if there is none."""
    name = chosen()
    if name == "auto":
        found = [b for b in reversed(_BACKENDS.values()) if op in b.kernels and _runs_on(b, device_type)]
        if not found:
            raise RuntimeError(f"no backend has a kernel for {op!r} on {device_type!r}")
        return found
    only = _BACKENDS[name]
    if only.device_types is not None and device_type not in only.device_types:
        raise RuntimeError(f"backend {name!r} runs on {list(only.device_types)}, not on {device_type!r}")
    if op not in only.kernels:
        raise RuntimeError(f"backend {name!r} has no kernel for {op!r}")
    return [only]


def serves(name: str, device_type: str) -> bool:
    """Whether the backend ``name`` can run here, serves the device and is not ruled out by another choice."""
    return chosen() in ("auto", name) and _runs_on(_BACKENDS[name], device_type)


def encoder(device_type: str) -> Encoder | None:
    """The encoder for weights on a device under the backend chosen; None where torch's operations have to do."""
    candidates = (b for b in reversed(_BACKENDS.values()) if b.encoder is not None and serves(b.name, device_type))
    return next((candidate.encoder for candidate in candidates), None)


def decoder_maker(device_type: str) -> DecoderMaker | None:
    """What makes decoder layers on a device under the backend chosen; None where the model's own code has to do."""
    candidates = (b for b in reversed(_BACKENDS.values()) if b.decoder is not None and serves(b.name, device_type))
    return next((candidate.decoder for candidate in candidates), None)


def _checked(name: str) -> str:
    """The backend's name, where ``name`` may be an alias."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name == "auto":
        return name
    if not isinstance(name, str) or name not in _BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *_BACKENDS]}, got {name!r}")
    reason = _BACKENDS[name].why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name
