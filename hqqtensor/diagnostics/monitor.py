"""PerformanceMonitor: what a model does while it is used, counted and timed as it happens."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hqqtensor.diagnostics.machine import memory_bandwidth, resident_bytes
from hqqtensor.diagnostics.size import model_size
from hqqtensor.diagnostics.usage import PassTimes, ProductCount, UsagePerformance
from hqqtensor.kernels import cpu
from hqqtensor.ops.observe import observed
from hqqtensor.ops.packed import LAYOUTS, PackedWeight
from hqqtensor.tensor import HQQTensor

if TYPE_CHECKING:
    from hqqtensor.generation.forward import DecoderForward

LATENCIES = 10_000
"""Passes of a kind whose latencies are kept, the last ones."""
MEMORY_EVERY = 0.25
"""Seconds between two looks at the resident memory."""
_Key = tuple[Any, ...]


class _Passes:
    """Forward passes of one kind."""

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self.seconds = 0.0
        self.latencies: deque[float] = deque(maxlen=LATENCIES)

    def add(self, tokens: int, seconds: float) -> None:
        self.count += 1
        self.tokens += tokens
        self.seconds += seconds
        self.latencies.append(seconds)


class PerformanceMonitor:
    """Counts and times the forward passes of ``model`` within a ``with`` block; ``report`` says what was seen, at any
    time and from any thread, also after the block.

    A pass is one call of ``model``, by whomever: ``generate``, a pipeline, your own code. "prompt" passes have several
    new tokens in a sequence, "decode" passes one; passes of models without token ids are "samples". On a GPU each pass
    waits for the device to finish, without which there is nothing to time.
    ``memory_bandwidth``: bytes a second that this machine reads; by default it is measured once in a process, for about
    a tenth of a second before the block begins.
    """

    def __init__(self, model: nn.Module, memory_bandwidth: float | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if memory_bandwidth is not None and not memory_bandwidth > 0:
            raise ValueError(f"memory_bandwidth must be above 0 bytes a second, got {memory_bandwidth!r}")
        self.model = model
        self._bandwidth = memory_bandwidth
        self._lock = threading.Lock()
        self._local = threading.local()
        self._passes: dict[str, _Passes] = {}
        self._products: dict[_Key, list[int]] = {}
        self._memory = self._most_memory = resident_bytes()
        self._looked = self._began = self._ended = 0.0
        self._decoded_before, self._decoded_after = (0, 0), (0, 0)
        self._stack: ExitStack | None = None

    def __enter__(self) -> "PerformanceMonitor":
        if self._began:
            raise RuntimeError("a monitor is for one block; make another one for another block")
        if self._bandwidth is None:
            self._bandwidth = memory_bandwidth()
        self._stack = ExitStack()
        for hook in (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ):
            self._stack.callback(hook.remove)
        self._stack.enter_context(observed(self._count))
        self._decoded_before = self._decoded()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._stack is not None
        self._ended, self._decoded_after = time.perf_counter(), self._decoded()
        self._stack.close()
        self._stack = None

    def serve_prometheus(self, port: int = 9464, address: str = "127.0.0.1") -> int:
        """Answer on ``http://address:port/metrics`` until the end of the block; the port (0 takes a free one).

        ImportError without prometheus_client, OSError where the port is taken, RuntimeError outside of the block.
        """
        from hqqtensor.diagnostics.prometheus import serve

        if self._stack is None:
            raise RuntimeError("serve_prometheus serves within the monitor's with block")
        port, stop = serve(self.report, port, address)
        self._stack.callback(stop)
        return port

    def prometheus_text(self) -> str:
        """The figures in Prometheus' text format, for an endpoint of your own. ImportError without the package."""
        from hqqtensor.diagnostics.prometheus import text

        return text(self.report)

    def table(self) -> str:
        """``report`` as text."""
        return str(self.report())

    def to_json(self) -> str:
        """``report`` as JSON."""
        return json.dumps(self.report().to_dict(), indent=2)

    def report(self) -> UsagePerformance:
        """What was seen so far."""
        with self._lock:
            passes = {kind: (p.count, p.tokens, p.seconds, sorted(p.latencies)) for kind, p in self._passes.items()}
            products = [(key, calls, count * nbytes) for key, (calls, count, nbytes) in self._products.items()]
        counts = [ProductCount(op, backend or _compiled(), *key, *n) for (op, backend, *key), *n in products]
        counts += self._decoder_products()
        return UsagePerformance(
            seconds=(self._ended or time.perf_counter()) - self._began if self._began else 0.0,
            passes={kind: PassTimes.of(*numbers) for kind, numbers in sorted(passes.items())},
            products=sorted(counts, key=lambda c: -c.nbytes),
            memory_bandwidth=self._bandwidth or 0.0,
            resident=self._memory,
            most_resident=self._most_memory,
            model_bytes=model_size(self.model).nbytes,
            why_no_decoder=self._why_no_decoder(),
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._local.began = time.perf_counter()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        began = getattr(self._local, "began", None)
        if began is None:  # the block began within this pass
            return
        self._local.began = None
        kind, tokens, device = _kind_of(args, kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        with self._lock:
            self._passes.setdefault(kind, _Passes()).add(tokens, now - began)
        if now - self._looked > MEMORY_EVERY:
            self._looked, self._memory = now, resident_bytes()
            self._most_memory = max(self._most_memory, self._memory)

    def _count(self, op: str, args: tuple[Any, ...], backend: str | None) -> None:
        if getattr(self._local, "began", None) is None:  # another model's, or nobody's
            return
        if op == "linear_many":
            weights, rows = args[1], args[0]
        else:
            weights, rows = (args[LAYOUTS[op][0]],), args[0]
        first: PackedWeight = weights[0]
        K = first.in_features
        tokens = 0 if op.startswith("dequantize") else rows.numel() if op == "embedding" else rows.numel() // max(1, K)
        N = sum(w.qdata.shape[-2] for w in weights)
        key = (op, backend, _rounded(tokens), N, K, first.nbits, first.format, first.group_size)
        with self._lock:
            numbers = self._products.get(key)
            if numbers is None:
                numbers = self._products[key] = [0, 0, _bytes_read(op, weights)]
            numbers[0] += 1
            numbers[1] += tokens if op == "embedding" else 1

    def _decoder(self) -> "DecoderForward | None":
        """What ``prepare_for_generation_`` put into the model."""
        module = sys.modules.get("hqqtensor.generation.forward")
        if module is None:
            return None
        forwards = (m.__dict__.get("forward") for m in self.model.modules())
        return next((f for f in forwards if isinstance(f, module.DecoderForward)), None)

    def _decoded(self) -> tuple[int, int]:
        """Calls and tokens that went through the decoder since it was made."""
        decoder = self._decoder()
        return (0, 0) if decoder is None else (decoder.decoded_calls, decoder.decoded_tokens)

    def _decoder_products(self) -> list[ProductCount]:
        """The products within decoder layers, by the sizes of the layers' weights."""
        decoder = self._decoder()
        until = self._decoded_after if self._ended else self._decoded()
        calls = until[0] - self._decoded_before[0]
        if decoder is None or calls <= 0:
            return []
        tokens = (until[1] - self._decoded_before[1]) / calls
        counts: dict[_Key, list[int]] = {}
        for weight in decoder.base.layers.parameters():
            if isinstance(weight, HQQTensor):
                key = (weight.out_features, weight.in_features, weight.nbits, weight.format, weight.group_size)
                numbers = counts.setdefault(key, [0, 0])
                numbers[0] += calls
                numbers[1] += int(calls * weight.nbytes * _share_of_experts(decoder.base, weight, tokens))
        rows = _rounded(round(tokens))
        return [ProductCount("decoder", _compiled(), rows, *key, *n) for key, n in counts.items()]

    def _why_no_decoder(self) -> str | None:
        decoder = self._decoder()
        return None if decoder is None else decoder.why_not


def _rounded(rows: int) -> int:
    """Up to a power of two, so that prompts of all lengths do not fill the memory with counts."""
    return 1 << (rows - 1).bit_length() if rows else 0


def _share_of_experts(base: Any, weight: HQQTensor, tokens: float) -> float:
    """The part of a stack of experts that is read for so many tokens, where no two tokens choose the same ones."""
    chosen = getattr(base.config, "num_experts_per_tok", None)
    return 1.0 if weight.rank < 3 or not chosen else min(1.0, tokens * chosen / weight.qdata.shape[0])


def _bytes_read(op: str, weights: tuple[PackedWeight, ...]) -> int:
    """Bytes of weights that a call reads: all of them, of an embedding those of a row."""
    tensors = [t for w in weights for t in (*w[:3], *(w.meta or ())) if t is not None]
    total = sum(t.nbytes for t in tensors)
    return total // max(1, weights[0].qdata.shape[-2]) if op == "embedding" else total


def _compiled() -> str:
    return f"cpu ({cpu.instruction_set()})" if cpu.why_unavailable() is None else "cpu"


def _kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, int, str]:
    """The kind of a pass, its tokens or samples, and the type of device."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    tensors = [t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 0]
    if not tensors:
        return "samples", 1, "cpu"
    first = tensors[0]
    if first is named[1] or (first.ndim == 2 and not first.is_floating_point()):
        return "decode" if first.shape[1] == 1 else "prompt", first.shape[0] * first.shape[1], first.device.type
    return "samples", first.shape[0], first.device.type
