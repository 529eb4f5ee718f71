"""The registry of backends and the choice among them.

A backend runs the ops on some kinds of device. ``auto`` takes the first available one, in order of
registration from the last, that serves the tensor's device; ``dequantize``, the plain reference, serves all.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from hqqtensor.ops.encoder import Encoder


@dataclass(frozen=True)
class Backend:
    """Kernels by op name ("linear", "batched_linear", "embedding", "dequantize"), and where they run.

    ``device_types`` None means every device. ``why_unavailable`` gives None, or the reason why it cannot run.
    ``encoder``: quantizes weights on those devices, where the backend can.
    """

    name: str
    kernels: Mapping[str, Callable]
    device_types: tuple[str, ...] | None = None
    why_unavailable: Callable[[], str | None] = field(default=lambda: None)
    encoder: Encoder | None = None


@dataclass(frozen=True)
class BackendStatus:
    """One line of ``describe_backends``."""

    name: str
    available: bool
    reason: str | None
    device_types: tuple[str, ...] | None


_BACKENDS: dict[str, Backend] = {}
_default = "auto"
_local: ContextVar[str | None] = ContextVar("hqqtensor_backend", default=None)


_observers: list[Callable[[str, str | None], None]] = []


def observe_choice(observer: Callable[[str, str | None], None]) -> None:
    """Call ``observer(process's choice, this thread's own choice)`` now and after each change: kernels that are called
    without a look at this registry keep their own copy."""
    _observers.append(observer)
    observer(_default, _local.get())


def _tell_observers() -> None:
    for observer in _observers:
        observer(_default, _local.get())


def register_backend(new: Backend) -> None:
    """Add a backend; a name that is taken, or "auto", raises ValueError."""
    if new.name in _BACKENDS or new.name == "auto":
        raise ValueError(f"backend {new.name!r} is already registered")
    _BACKENDS[new.name] = new


def describe_backends() -> list[BackendStatus]:
    """Every registered backend, whether it can run here, and why not."""
    reasons = [(b, b.why_unavailable()) for b in _BACKENDS.values()]
    return [BackendStatus(b.name, reason is None, reason, b.device_types) for b, reason in reasons]


def set_backend(name: str) -> None:
    """Choose the backend of the process; one that is unknown or cannot run here raises with the reason."""
    global _default
    _check(name)
    _default = name
    _tell_observers()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend within a ``with`` block, for this thread; raises like ``set_backend``."""
    _check(name)
    token = _local.set(name)
    _tell_observers()
    try:
        yield
    finally:
        _local.reset(token)
        _tell_observers()


def kernel(op: str, device_type: str) -> Callable:
    """The chosen backend's kernel of ``op`` for a device; raises RuntimeError where it has none."""
    name = _local.get() or _default
    if name != "auto":
        chosen = _BACKENDS[name]
        if chosen.device_types is not None and device_type not in chosen.device_types:
            raise RuntimeError(f"backend {name!r} runs on {list(chosen.device_types)}, not on {device_type!r}")
        if op not in chosen.kernels:
            raise RuntimeError(f"backend {name!r} has no kernel for {op!r}")
        return chosen.kernels[op]
    for candidate in reversed(_BACKENDS.values()):
        serves = candidate.device_types is None or device_type in candidate.device_types
        if serves and op in candidate.kernels and candidate.why_unavailable() is None:
            return candidate.kernels[op]
    raise RuntimeError(f"no backend has a kernel for {op!r} on {device_type!r}")


def serves(name: str, device_type: str) -> bool:
    """Whether the backend ``name`` can run here, serves the device and is not ruled out by another choice."""
    known = _BACKENDS[name]
    return (
        (_local.get() or _default) in ("auto", name)
        and known.why_unavailable() is None
        and (known.device_types is None or device_type in known.device_types)
    )


def encoder(device_type: str) -> Encoder | None:
    """The encoder for weights on a device under the backend chosen; None where torch's operations have to do."""
    candidates = (b for b in reversed(_BACKENDS.values()) if b.encoder is not None and serves(b.name, device_type))
    return next((candidate.encoder for candidate in candidates), None)


def _check(name: str) -> None:
    if name == "auto":
        return
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *_BACKENDS]}, got {name!r}")
    reason = _BACKENDS[name].why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
