"""Which tensors of the files become which tensor of the model, as transformers' ``from_pretrained`` has it.

Names are changed and tensors merged or split by transformers' own conversions (``transformers.core_model_loading``).
Each is tried on the meta device first, which tells the shapes that it gives, and runs again for each tensor of the
model when that is read.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.streaming.source import NotStreamable, Source, StoredTensor

COMPARED = 16 * 2**20
"""Bytes of two tensors that are compared at a time."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """A ``WeightConverter`` of transformers and what it takes: (its pattern, the tensor, the dtype that it is given).

    first_name: the tensor of the model that transformers calls it for.
    """

    converter: Any
    first_name: str
    model: Any
    taken: list[tuple[str, StoredTensor, torch.dtype]] = field(default_factory=list)

    def run(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The tensors of the model by name; ``tensors``: the values of ``taken``, which are freed on the way."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored, dtype in self.taken:
            converter.add_tensor(self.first_name, stored.name, pattern, tensors.pop(0).to(dtype))
        values = converter.convert(self.first_name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def shapes(self) -> dict[str, Tensor]:
        """``run`` without numbers."""
        return self.run([torch.empty(stored.shape, dtype=stored.dtype, device="meta") for _, stored, _ in self.taken])


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the model, and what it is read from: one stored tensor, or a conversion of several."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: StoredTensor | Conversion

    @property
    def is_plain(self) -> bool:
        """Whether its rows are rows of one stored tensor."""
        return isinstance(self.source, StoredTensor)

    @property
    def nbytes_read(self) -> int:
        """Bytes that are read for it."""
        stored = self.source
        return stored.nbytes if isinstance(stored, StoredTensor) else sum(t.nbytes for _, t, _ in stored.taken)

    def read(self, source: Source, first: int = 0, count: int | None = None) -> Tensor:
        """Its values; of a plain one also ``count`` of its first dimension from ``first`` on."""
        if isinstance(self.source, StoredTensor):
            return source.read(self.source, first, count).to(self.dtype)
        return self.source.run([source.read(stored) for _, stored, _ in self.source.taken])[self.name].contiguous()


def find_targets(model: Any, source: Source) -> dict[str, Target]:
    """Of each tensor of the model's state that the files hold: where it comes from.

    model: on the meta device, its weights tied, built in the dtype to load it in. NotStreamable where
    ``from_pretrained`` would make up values, or would not tie weights that the model ties; CheckpointError for a shape
    that is not the model's.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    targets: dict[str, Target] = {}
    for name, shape, value_dtype, taken in _loaded(model, source, state):
        if shape != state[name].shape:
            raise CheckpointError(f"{name}: the files have shape {list(shape)}, the model {list(state[name].shape)}")
        targets.setdefault(name, Target(name, shape, value_dtype, taken))
    for names in ties(state):
        present = [name for name in names if name in targets]
        if not present:
            raise NotStreamable(f"its files have no value for {names[0]}, which transformers would make up")
        for other in present[1:]:
            if not _are_equal(source, targets[present[0]], targets[other]):
                raise NotStreamable(f"{present[0]} and {other} should be tied and differ in its files")
    return targets


def ties(state: dict[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of a state: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise NotStreamable(f"{name} is no tensor")
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _loaded(
    model: Any, source: Source, state: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, StoredTensor | Conversion]]:
    """(name, shape, dtype, where it comes from) of each tensor that ``from_pretrained`` loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, dtype_of = model.base_model_prefix, _Dtypes(model)
    conversions: dict[str, Conversion] = {}
    for key in sorted(source.tensors, key=dot_natural_key):
        stored = source.tensors[key]
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is None:
            yield name, stored.shape, dtype_of(name, state[name]), stored
        else:
            conversion = conversions.setdefault(name, Conversion(by_pattern[pattern], name, model))
            conversion.taken.append((pattern, stored, dtype_of(name, state[name])))
    for conversion in conversions.values():
        try:
            shapes = conversion.shapes()
        except Exception as error:
            raise NotStreamable(f"{conversion.first_name} cannot be planned: {error}") from error
        for name, value in shapes.items():
            if name in state:
                yield name, tuple(value.shape), value.dtype, conversion


class _Dtypes:
    """The dtype in which transformers loads a tensor: the model's, but for what a model keeps in float32."""

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import build_glob_alternation

        self.plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
        self.search, self.pattern_of, _ = build_glob_alternation(list(self.plan)) if self.plan else (None, {}, {})

    def __call__(self, name: str, parameter: Tensor) -> torch.dtype:
        match = None if self.search is None else self.search.search(name)
        return parameter.dtype if match is None else self.plan[self.pattern_of[match.lastgroup]]


def _are_equal(source: Source, first: Target, second: Target) -> bool:
    if not (first.is_plain and second.is_plain and first.shape == second.shape and first.dtype == second.dtype):
        return False
    if not first.shape:
        return torch.equal(first.read(source), second.read(source))
    step = max(1, COMPARED * first.shape[0] // max(1, first.nbytes_read))
    for begin in range(0, first.shape[0], step):
        rows = (begin, min(step, first.shape[0] - begin))
        if not torch.equal(first.read(source, *rows), second.read(source, *rows)):
            return False
    return True
