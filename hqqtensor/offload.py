"""A model whose blocks lie on disk: the weights of a block are in memory while it runs, and then go.

Calibration and search run such a model as they run any other. Only code that touches the weights of a block outside of
its forward pass has to ask for them, with ``loaded``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Slot = tuple[nn.Module, str]
"""A module and the name of a parameter of it."""


class OffloadedBlocks:
    """Puts weights into a model on the meta device while they are needed; ``close`` makes it what it was.

    model: on the meta device, its weights tied. blocks: names of modules that do not contain one another. read(name):
    the values of a parameter or a stored buffer by its name in the model. Whatever lies outside of the blocks, or is
    used by several of them, is read at once and stays. A parameter that is not on the meta device, such as a quantized
    one that was put into its place, is left alone.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.model, self.blocks, self._read = model, list(blocks), read
        self._users = dict.fromkeys(blocks, 0)
        self._kept_bytes: dict[str, int] = {}
        self._limit = 0
        self._loaded: dict[str, list[tuple[Slot, nn.Parameter, nn.Parameter]]] = {}  # slot, on meta, with values
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self._slots = self._by_block()
        self._load("")
        self._load_buffers()
        for name in blocks:
            self._wrap(name)

    def close(self) -> None:
        """Put the model on the meta device again and drop all values."""
        self._limit = 0
        for module, forward in self._forwards:
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward
        self._forwards.clear()
        for name in list(self._loaded):
            self._drop(name)
        for module, leaf, buffer in self._buffers:
            module._buffers[leaf] = buffer
        self._buffers.clear()
        self._kept_bytes.clear()

    @contextlib.contextmanager
    def loaded(self, name: str) -> Iterator[None]:
        """Hold the weights of the block ``name``, or of the block that the module ``name`` is in, in memory."""
        block = next((b for b in self.blocks if name == b or name.startswith(f"{b}.")), None)
        if block is None:
            yield
            return
        if block not in self._loaded:
            self._load(block)
        self._users[block] += 1
        try:
            yield
        finally:
            self._users[block] -= 1
            if not self._users[block] and not self._may_stay(block):
                self._drop(block)

    @contextlib.contextmanager
    def keeping(self, limit: int) -> Iterator[None]:
        """Let blocks stay in memory once they were read, up to ``limit`` bytes, for passes that run them many times."""
        self._limit = limit
        try:
            yield
        finally:
            self._limit = 0
            for block in list(self._kept_bytes):
                del self._kept_bytes[block]
                if not self._users[block]:
                    self._drop(block)

    def values(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter of the model with its values."""
        return self._with_values(parameter) if parameter.is_meta else parameter

    @contextlib.contextmanager
    def replaced(self, parameter: nn.Parameter, other: nn.Parameter) -> Iterator[None]:
        """Let the model use ``other`` in place of a parameter of a block, whether that block is in memory or not."""
        places = [(m, leaf) for slots in self._slots.values() for m, leaf, meta in slots if meta is parameter]
        before = [module._parameters[leaf] for module, leaf in places]
        try:
            for module, leaf in places:
                module._parameters[leaf] = other
            yield
        finally:
            for (module, leaf), value in zip(places, before, strict=True):
                module._parameters[leaf] = value

    def _by_block(self) -> dict[str, list[tuple[nn.Module, str, nn.Parameter]]]:
        """Where the model uses its parameters, by block; under "" those that stay in memory."""
        homes: dict[int, set[str]] = {}
        places = []
        for name, module in self.model.named_modules():
            block = next((b for b in self.blocks if name == b or name.startswith(f"{b}.")), "")
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    homes.setdefault(id(parameter), set()).add(block)
                    places.append((module, leaf, parameter))
        slots: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {name: [] for name in ("", *self.blocks)}
        for place in places:
            of_parameter = homes[id(place[2])]
            slots[next(iter(of_parameter)) if len(of_parameter) == 1 else ""].append(place)
        return slots

    def _load(self, block: str) -> None:
        values: dict[int, nn.Parameter] = {}
        entries: list[tuple[Slot, nn.Parameter, nn.Parameter]] = []
        for module, leaf, meta in self._slots[block]:
            if module._parameters[leaf] is meta:
                if id(meta) not in values:
                    values[id(meta)] = self._with_values(meta)
                entries.append(((module, leaf), meta, values[id(meta)]))
        for (module, leaf), _, value in entries:
            module._parameters[leaf] = value
        self._loaded[block] = entries

    def _drop(self, block: str) -> None:
        for (module, leaf), meta, value in self._loaded.pop(block):
            if module._parameters[leaf] is value:
                module._parameters[leaf] = meta

    def _may_stay(self, block: str) -> bool:
        if block in self._kept_bytes:
            return True
        nbytes = sum({id(value): value.nbytes for _, _, value in self._loaded[block]}.values())
        if sum(self._kept_bytes.values()) + nbytes > self._limit:
            return False
        self._kept_bytes[block] = nbytes
        return True

    def _with_values(self, meta: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(self._read(self._names[id(meta)]), requires_grad=False)

    def _load_buffers(self) -> None:
        stored = self.model.state_dict(keep_vars=True)
        for prefix, module in self.model.named_modules():
            for leaf, buffer in module._buffers.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if buffer is not None and name in stored:
                    self._buffers.append((module, leaf, buffer))
                    module._buffers[leaf] = self._read(name)

    def _wrap(self, name: str) -> None:
        module = self.model.get_submodule(name)
        forward = module.forward
        self._forwards.append((module, module.__dict__.get("forward")))

        @functools.wraps(forward)
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            with self.loaded(name):
                return forward(*args, **kwargs)

        module.forward = with_weights  # type: ignore[method-assign, assignment]
