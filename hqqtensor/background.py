"""quantize_in_background: a model answers on its dense weights while a thread quantizes them one after another."""

import atexit
import contextlib
import ctypes
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.parameters import Place, places_by_id, swap_together
from hqqtensor.selection import Choice, check_shapes, choose

NICER = 10
"""How much lower than the process's the thread's priority is: busy forward passes leave it about a tenth of a core."""
TRIM_AFTER = 64 << 20
"""Bytes of dense weights that are dropped before the allocator is asked to give its free memory back."""

CHECKING = "checking"
"""Name under which ``progress`` reports until the first weight is quantized."""


@dataclass(frozen=True)
class JobProgress:
    """How far a job is. done, total: numbers of weights' elements, as for ``quantize_``. name: the weight that was
    swapped last, or "checking". state: "running", "finished", "cancelled" or "failed". seconds: since the start, or
    from the start to the end."""

    done: int
    total: int
    name: str
    state: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.state}: {100 * self.done // max(1, self.total)} % in {self.seconds:.1f} s ({self.name})"


class QuantizationJob:
    """A model that is being quantized by a thread; made by ``quantize_in_background``.

    quantized_names: names of the parameters that are swapped in so far; a tied weight is there under each of its names.
    error: what stopped the thread, or None. After an error or ``cancel`` the model stays usable, with these parameters
    quantized and all others dense, and another call of ``quantize_`` or ``quantize_in_background`` with the same
    config quantizes the others.
    """

    def __init__(
        self, model: nn.Module, choices: list[Choice], progress: Callable[[int, int, str], None] | None
    ) -> None:
        self.quantized_names: list[str] = []
        self.error: Exception | None = None
        self._total, self._done, self._name = sum(choice.weight.numel() for choice in choices), 0, CHECKING
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._report = progress
        self._begin, self._end = time.monotonic(), 0.0
        places = places_by_id(model)
        work = [(choice, places[id(choice.weight)]) for choice in choices]
        # A daemon, so that a program that fails ends at once: a weight that is being quantized is lost, no more.
        self._thread = threading.Thread(target=self._run, args=(work,), name="hqqtensor-quantize", daemon=True)

    def start(self) -> None:
        """Start the thread; called once, by ``quantize_in_background``."""
        atexit.register(_stop, weakref.ref(self))
        self._thread.start()

    @property
    def state(self) -> str:
        """ "running", "finished", "cancelled" or "failed"."""
        if not self._ended.is_set():
            return "running"
        if self.error is not None:
            return "failed"
        return "finished" if self._done == self._total else "cancelled"

    def progress(self) -> JobProgress:
        """How far the job is, at this moment."""
        seconds = (self._end or time.monotonic()) - self._begin
        return JobProgress(self._done, self._total, self._name, self.state, seconds)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; whether it has come (``state`` says which).

        Raises what stopped the thread: ValueError for a weight that holds NaN (nothing has changed then) or that the
        config cannot store, RuntimeError for one that was changed meanwhile, or the error of ``progress``.
        """
        ended = self._ended.wait(timeout)
        if self.error is not None:
            raise self.error
        return ended

    def cancel(self) -> None:
        """Stop after the weight that is at work, and wait for that. What is swapped in stays; see ``quantized_names``.

        Called by ``progress``, that is by the thread itself, it does not wait.
        """
        self._cancelled.set()
        if threading.current_thread() is not self._thread:
            self._ended.wait()

    def _run(self, work: list[tuple[Choice, list[Place]]]) -> None:
        try:
            _lower_priority()
            self._check([choice for choice, _ in work])
            self._quantize(work)
        except Exception as error:
            self.error = error
        finally:
            work.clear()
            _give_memory_back()
            self._end = time.monotonic()
            self._ended.set()

    def _check(self, choices: list[Choice]) -> None:
        for choice in choices:
            if self._cancelled.is_set():
                return
            choice.check(choice.weight)

    def _quantize(self, work: list[tuple[Choice, list[Place]]]) -> None:
        work.reverse()
        dropped = 0
        while work and not self._cancelled.is_set():
            choice, places = work.pop()
            dropped += _swap(choice, places)
            self._done += choice.weight.numel()
            self._name = choice.names[0]
            self.quantized_names += choice.names
            done = self._done, self._total, self._name
            # From here on nothing of this thread holds the dense weight.
            del choice, places
            if dropped >= TRIM_AFTER:
                _give_memory_back()
                dropped = 0
            if self._report is not None:
                self._report(*done)


def quantize_in_background(
    model: nn.Module,
    config: HqqConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> QuantizationJob:
    """Begin to quantize ``model`` and return at once; the model answers on what is quantized so far and dense weights.

    Chosen are the weights that ``quantize_`` chooses with the same ``config`` and ``filter_fn``, and the codes are the
    same, bit for bit. A thread of low priority quantizes one weight after another and swaps each in: a forward
    pass that runs meanwhile uses the old or the new weight of a layer, never a part of each, and all modules of a tied
    weight get the new one together. The memory of dense weights is given back to the system as they are swapped.
    ``progress(done, total, name)`` is called by that thread after each weight.

    Settings, names and shapes are checked before this returns, numbers (NaN, Inf) by the thread before the first weight
    is swapped; ``QuantizationJob.wait`` raises what it finds. Do not train, move or convert the model before the end: a
    weight that was changed or replaced meanwhile stops the job with an error that names it. Calibration needs the
    whole model dense and runs it; use ``quantize_`` for that.

    Raises TypeError or ValueError as ``quantize_``, with nothing changed.
    """
    if not isinstance(config, HqqConfig):
        raise TypeError(f"config must be an HqqConfig, got {type(config).__name__}")
    choices, already = choose(model, config, filter_fn)
    for choice in choices:
        if choice.weight.device.type == "meta":
            choice.check(choice.weight)
    check_shapes(choices)
    if already:
        warnings.warn(
            f"{len(already)} weights are quantized already and were left alone, e.g. {already[0]}", stacklevel=2
        )
    elif not choices:
        raise ValueError("nothing to quantize: no nn.Linear (or module that filter_fn accepts) outside skip_modules")
    job = QuantizationJob(model, choices, progress)
    job.start()
    return job


def _swap(choice: Choice, places: list[Place]) -> int:
    """Quantize a weight and put it in its places; the bytes of the dense one."""
    weight, before = choice.weight, _identity(choice.weight)
    try:
        quantized = choice.quantize(weight)
    except ValueError as error:
        raise ValueError(f"{choice.names[0]}: {error}") from None
    if _identity(weight) != before:
        raise RuntimeError(f"{choice.names[0]} was changed while it was quantized; it stays dense")
    if not swap_together(places, weight, quantized):
        raise RuntimeError(f"{choice.names[0]} was replaced by other code while it was quantized; it stays as it is")
    return weight.nbytes


def _identity(weight: nn.Parameter) -> tuple[Any, ...]:
    """Equal as long as nobody writes to the weight or gives it other data."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


def _lower_priority() -> None:
    """Let forward passes go first: threads that this one starts, such as those of the solver, inherit its priority."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICER))


def _give_memory_back() -> None:
    """Free memory that the C library keeps for later goes to the system. Large blocks do so by themselves."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _stop(reference: "weakref.ref[QuantizationJob]") -> None:
    """At the end of the process: its modules must not go while the thread still uses them."""
    job = reference()
    if job is not None:
        job.cancel()
