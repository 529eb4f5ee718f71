"""Decoder layers of any model of transformers through torch.compile: one layer is compiled, and all others use its
graph.

A layer's weights, keys and values are inputs of the graph, so it serves every layer that is built alike; the number of
tokens in the cache is one of its symbols, so it serves every length. Prompts take transformers' own code.
"""

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hqqtensor.generation.cache import RoomyLayer, RoomySlidingLayer, adopt, growing_cache
from hqqtensor.integrations.transformers.attention import NAME as ATTENTION

MOST_BATCH = 8
MOST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By dtype: the norm of the difference of the logits over their norm, after one token."""


class _OneLayer:
    """What a layer takes for the cache: keys and values ``[B, H, T, D]``, to which a token is written at ``place``."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self.keys, self.values, self.place = keys, values, place

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


def _run(
    layer: Any, keys: Tensor, values: Tensor, place: Tensor, position: int | None, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """The layer's own code. position: where the cache is among ``args``; None if it is a keyword."""
    cache = _OneLayer(keys, values, place)
    if position is None:
        kwargs = {**kwargs, "past_key_values": cache}
    else:
        args = (*args[:position], cache, *args[position + 1 :])
    return type(layer).forward(layer, *args, **kwargs)


@functools.cache
def _graph() -> Any:
    return torch.compile(_run, fullgraph=True)


class CompiledLayer:
    """Called instead of ``layer.forward``: one new token goes through the graph, all else as before.

    ``calls`` counts what went through the graph. Where torch.compile gives up, ``why_not`` says why, a warning is given
    once, and the layer's own code runs from then on.
    """

    def __init__(self, layer: nn.Module, index: int, attention: str | None) -> None:
        self.layer, self.index, self.attention = layer, index, attention
        self.calls = 0
        self.why_not: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = None if self.why_not is not None else self._compiled(args, kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs) if out is None else out

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the graph gives; None where the call is not one for it."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != 1 or hidden.shape[0] > MOST_BATCH:
            return None
        position = next((i for i, arg in enumerate(args) if type(arg) is DynamicCache), None)
        cache = args[position] if position is not None else kwargs.get("past_key_values")
        if type(cache) is not DynamicCache or len(cache.layers) <= self.index or cache.offloading:
            return None
        if torch.is_grad_enabled() or self.layer.training or kwargs.get("output_attentions"):
            return None
        if hidden.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        held = adopt(cache.layers[self.index])
        if type(held) not in (RoomyLayer, RoomySlidingLayer) or held.batch != hidden.shape[0] or held.is_empty:
            return None
        cache.layers[self.index] = held
        buffers = held.make_room(1)
        keys, values = (buffer[:, :, held.start : held.end + 1] for buffer in buffers)
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        _mark_lengths(keys, values, *args, *kwargs.values())
        try:
            place = torch.tensor([held.end - held.start])
            out = _graph()(self.layer, keys, values, place, position, args, kwargs)
        except _compile_errors() as error:  # nothing has been added to the cache yet
            self.why_not = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"layer {self.index} runs uncompiled from now on: {self.why_not}", stacklevel=2)
            return None
        held.advance(1)
        self.calls += 1
        return out


def _mark_lengths(keys: Tensor, values: Tensor, *others: Any) -> None:
    """Tell torch.compile that the number of tokens changes, so that it compiles once for all."""
    for t in (keys, values):
        torch._dynamo.mark_dynamic(t, 2)
    for t in others:  # a mask
        if isinstance(t, Tensor) and t.ndim == 4 and t.shape[-1] == keys.shape[2]:
            torch._dynamo.mark_dynamic(t, 3)


@functools.cache
def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def compile_layers_(model: Any) -> None:
    """Put a ``CompiledLayer`` in the place of each layer's ``forward``, after the graph was compiled and compared.

    ValueError, and the model is as it was, where the model has no such layers, torch.compile cannot compile them, or
    they would give other results.
    """
    name, layers = type(model).__name__, _layers(model)
    if any("forward" in layer.__dict__ for layer in layers):
        raise ValueError(f"{name} has layers with another forward of their own already (accelerate's hooks, for one)")
    if model.training or next(model.parameters()).device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU and not in training: call model.eval() first")
    print(f"compiling one layer of {name}: up to a minute the first time, seconds later", file=sys.stderr)
    want = _logits(model)
    attention = model.config._attn_implementation
    with _undone_on_error(model):
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError:  # the model has attention of its own
            attention = None
        for i, layer in enumerate(layers):
            layer.forward = CompiledLayer(layer, i, attention)  # type: ignore[assignment]
        got, first = _logits(model), layers[0].forward
        if not first.calls:  # type: ignore[union-attr]
            why = first.why_not or "its layers take no cache of transformers"  # type: ignore[union-attr]
            raise ValueError(f"{name} is generated with as before: {why}")
        error = float((got - want).norm() / want.norm())
        if not error <= MOST_ERROR.get(model.dtype, 1e-3):
            raise ValueError(f"{name} would give other results compiled: relative error {error:.2g}")


@contextmanager
def _undone_on_error(model: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        restore_layers_(model)
        raise


def restore_layers_(model: Any) -> None:
    """Take ``compile_layers_`` back; nothing where it was not called."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, CompiledLayer):
            del module.forward
            if forward.attention is not None and model.config._attn_implementation != forward.attention:
                model.set_attn_implementation(forward.attention)


def is_compiled(model: Any) -> bool:
    """Whether layers of the model have been compiled by ``compile_layers_``."""
    return any(isinstance(module.__dict__.get("forward"), CompiledLayer) for module in model.modules())


def _layers(model: Any) -> list[Any]:
    """The decoder layers; ValueError where there is no list of them."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    alike = [found for found in lists if len({type(layer) for layer in found}) == 1]
    if not alike:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers as config.num_hidden_layers counts them"
        )
    return list(alike[0])


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Float32 logits of the token after a few others, with the model's own way into a cache."""
    ids = torch.arange(6).unsqueeze(0) % model.config.vocab_size
    cache = growing_cache(model.config)
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    return model(ids[:, 5:], past_key_values=cache, use_cache=True).logits.float()
