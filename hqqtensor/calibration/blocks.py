"""Chains of blocks: the layers of an ``nn.ModuleList`` that hand hidden states from one to the next."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.forward import run, without_cache

_HIDDEN = "hidden_states"
_CACHES = ("past_key_values", "past_key_value", "cache_params")


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with in one pass, apart from its hidden states.

    positional: arguments behind the hidden states. keywords: the others. hidden_by_name: whether the hidden states came
    as the keyword ``hidden_states``.
    """

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden_by_name: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that ``block`` makes of ``hidden``."""
        if self.hidden_by_name:
            return _hidden_of(block(*self.positional, hidden_states=hidden, **self.keywords))
        return _hidden_of(block(hidden, *self.positional, **self.keywords))


@dataclass(frozen=True)
class Chain:
    """Blocks that ran one after the other in every pass, each on what the one before gave.

    names: of the blocks, in the order of calls. hidden: what the first was given, one tensor a batch. calls: the other
    arguments, by block and batch.
    """

    names: list[str]
    hidden: list[Tensor]
    calls: list[list[BlockCall]]


def block_lists(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each outermost ``nn.ModuleList`` of two or more modules that all hold linear layers."""
    found: list[list[str]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(name.startswith(i) for i in inside):
            continue
        if all(any(isinstance(m, nn.Linear) for m in block.modules()) for block in module):
            prefix = f"{name}." if name else ""
            inside.append(prefix)
            found.append([f"{prefix}{i}" for i in range(len(module))])
    return found


@torch.inference_mode(False)
@torch.no_grad()
def trace(model: nn.Module, batches: Sequence[Any], lists: Sequence[Sequence[str]]) -> list[Chain]:
    """Run ``batches`` and note what blocks are called with; the lists that turn out to be chains.

    The first batch runs through the blocks and shows which lists are chains. Where there is one list, and its blocks
    give hidden states and nothing else, they let later batches pass as they are: what else blocks are called with does
    not depend on what they give. Memory: the hidden states before each chain, and the other arguments, which most
    blocks share. The model is to be in eval mode.
    """
    tracers = [_Tracer(names) for names in lists]
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_cache(model))
        for tracer in tracers:
            stack.enter_context(tracer.watching(model))
        for i, batch in enumerate(batches):
            for tracer in tracers:
                tracer.begin()
            run(model, batch)
            for tracer in tracers:
                tracer.end()
            tracers = [t for t in tracers if t.is_chain]
            if i == 0 and len(lists) == len(tracers) == 1 and tracers[0].gives_hidden_only:
                stack.enter_context(tracers[0].passing_through(model))
    return [
        Chain(list(t.names), t.hidden, [[batch[i] for batch in t.calls] for i in range(len(t.names))]) for t in tracers
    ]


class _Tracer:
    """Watches the blocks of one list."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.is_chain = self.gives_hidden_only = True
        self.hidden: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []  # by batch and block
        self.last: Tensor | None = None

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for i, name in enumerate(self.names):
                block = model.get_submodule(name)
                before = functools.partial(self._before, index=i)
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._after).remove)
            yield

    @contextlib.contextmanager
    def passing_through(self, model: nn.Module) -> Iterator[None]:
        """Blocks return the hidden states that they are given."""
        blocks = [model.get_submodule(name) for name in self.names]
        own = [block.__dict__.get("forward") for block in blocks]
        try:
            for block in blocks:
                block.forward = _pass_through  # type: ignore[method-assign, assignment]
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.forward = forward

    def begin(self) -> None:
        self.calls.append([])

    def end(self) -> None:
        self.is_chain = self.is_chain and len(self.calls[-1]) == len(self.names)
        self.last = None

    def _before(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        if not self.is_chain:
            return
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        calls = self.calls[-1]
        if len(calls) != index or not isinstance(hidden, Tensor) or not (index == 0 or _same(hidden, self.last)):
            self.is_chain = False
            return
        if index == 0:
            self.hidden.append(hidden.detach().clone())
        keywords = {k: v for k, v in kwargs.items() if k not in _CACHES and (args or k != _HIDDEN)}
        calls.append(BlockCall(args[1:], keywords, not args))

    def _after(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.last = _hidden_of(output)
        self.gives_hidden_only = self.gives_hidden_only and isinstance(output, Tensor)


def _pass_through(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs[_HIDDEN]


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _same(a: Tensor, b: Tensor | None) -> bool:
    return a is b or (
        isinstance(b, Tensor) and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
    )
