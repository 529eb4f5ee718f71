"""The whole output before the first weight is read: files, their headers, and where in them each tensor will lie.

Every process that is given the same command makes the same plan, so that each can write its tensors to their places.
Only the dtype of plain scales is not known: the plan takes float16, and ``shards.lay_out_again`` moves the tensors of
a file where it was float32 after all.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.config import HqqConfig
from hqqtensor.parameters import replace_parameters
from hqqtensor.run_record import digest
from hqqtensor.selection import Choice, choose
from hqqtensor.serialization.header import file_metadata
from hqqtensor.serialization.layout import flatten
from hqqtensor.serialization.publish import shard_names
from hqqtensor.serialization.save import GUARD, into_shards, shard_limit, takes_guard
from hqqtensor.streaming.source import Source, by_name
from hqqtensor.streaming.targets import Target, find_targets, ties
from hqqtensor.streaming.template import GUESS, OTHER, rows_are_independent, template

BATCH_BYTES = 32 * 2**20
"""About how many bytes of dense weights a process takes, and reports as finished, at a time."""

PIECE_BYTES = 32 * 2**20
"""Dense tensors of more bytes go in pieces of rows of about this size, where rows do not depend on one another."""

_ALIGNMENT = 8


@dataclass(frozen=True)
class Part:
    """A tensor of an output file. is_open: whether its dtype is a guess."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_open: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def as_other(self) -> "Part":
        """The part where the guess was wrong."""
        return Part(self.key, OTHER, self.shape) if self.is_open else self


@dataclass(frozen=True, eq=False)
class Unit:
    """A tensor of the model and what is stored of it. choice: how it is quantized, None for one that stays dense.

    number: its place among all units. entry: its JSON entry in the metadata. rows: of its first dimension at a time, or
    None where it goes as a whole.
    """

    number: int
    name: str
    target: Target
    choice: Choice | None
    parts: tuple[Part, ...]
    entry: str
    rows: int | None

    @property
    def weights(self) -> int:
        """Elements to quantize; 0 for a tensor that stays dense."""
        return 0 if self.choice is None else self.choice.weight.numel()

    @property
    def nbytes(self) -> int:
        """Bytes in the file, if the guess is right."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, eq=False)
class Batch:
    """Units, one after the other in one file, that a process takes together."""

    number: int
    shard: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, eq=False)
class Shard:
    """An output file: its name, its units, the bytes of its header, and where the data of each part begin in it."""

    name: str
    units: tuple[Unit, ...]
    header: bytes
    begins: Mapping[str, int]
    nbytes: int


@dataclass(eq=False)
class Plan:
    """See the top of the module. model: the empty model that it is for. run: what the run is, for ``run_record``."""

    model: nn.Module
    shards: list[Shard]
    batches: list[Batch]
    metadata: dict[str, str]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> list[Unit]:
        """Those of all files."""
        return [unit for shard in self.shards for unit in shard.units]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(shard.nbytes for shard in self.shards)

    def show_quantized(self, other: set[int]) -> None:
        """Put what is stored into the model, without numbers. other: numbers of the units whose guess was wrong."""
        quantized = {
            id(unit.choice.weight): nn.Parameter(
                template(unit.choice, unit.target.dtype, OTHER if unit.number in other else GUESS), requires_grad=False
            )
            for unit in self.units
            if unit.choice is not None
        }
        replace_parameters(self.model, quantized)


def make_plan(
    model: nn.Module, source: Source, config: HqqConfig, max_shard_size: int | str = "5GB",
    calibration: str | None = None,
) -> Plan:  # fmt: skip
    """The plan for ``model`` (on the meta device, tied, in the dtype to load it in), whose weights ``source`` holds.

    calibration: the label of one that is to come first.
    Errors as ``find_targets`` and ``choose``; ValueError for a bad ``max_shard_size``.
    """
    limit = shard_limit(max_shard_size)
    targets = find_targets(model, source)
    choices, _ = choose(model, config)
    units, aliases = _units(model, targets, {id(choice.weight): choice for choice in choices})
    identity = digest(source.identity())
    version = sys.modules["hqqtensor"].__version__  # an import would be a circle
    run = {"hqqtensor": version, "torch": torch.__version__, "max_shard_size": limit, "settings": config.to_dict()}
    run["model"] = identity
    if calibration is not None:
        run["calibration"] = calibration
    entries = {unit.name: unit.entry for unit in units}
    metadata = file_metadata(entries, aliases, [], save=digest(run)[:16])
    parts_of = into_shards([unit.nbytes for unit in units], limit)
    names = shard_names("model", len(parts_of))
    shards = [make_shard(name, units[part], metadata) for name, part in zip(names, parts_of, strict=True)]
    batches: list[Batch] = []
    for place, shard in enumerate(shards):
        sizes = [unit.target.nbytes_read for unit in shard.units]
        batches += [Batch(len(batches) + i, place, shard.units[b]) for i, b in enumerate(_in_batches(sizes))]
    # The journal counts batches: a run that cuts them otherwise cannot read it.
    run["plan"] = digest([[b.shard, [[u.name, u.entry, [p.key for p in u.parts]] for u in b.units]] for b in batches])
    return Plan(model, shards, batches, metadata, run)


def make_shard(name: str, units: Sequence[Unit], metadata: Mapping[str, str], other: set[int] | None = None) -> Shard:
    """A file of ``units``; other: numbers of those whose guess was wrong.

    Data of wider elements come first, so that all lie at multiples of their size, as far as the format allows.
    """
    parts = [part.as_other() if unit.number in (other or ()) else part for unit in units for part in unit.parts]
    offset, header, offsets = 0, {"__metadata__": dict(metadata)}, {}
    for part in sorted(parts, key=lambda part: -part.dtype.itemsize):
        end = offset + part.nbytes
        entry: Any = {"dtype": by_name(part.dtype), "shape": list(part.shape), "data_offsets": [offset, end]}
        header[part.key], offsets[part.key] = entry, offset
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begin = 8 + len(text)
    begins = {key: begin + offset for key, offset in offsets.items()}
    return Shard(name, tuple(units), len(text).to_bytes(8, "little") + text, begins, begin + offset)


def _units(
    model: nn.Module, targets: Mapping[str, Target], choices: Mapping[int, Choice]
) -> tuple[list[Unit], dict[str, str]]:
    """The tensors to store in the order of the model's state, and the names that stand for others."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    units: list[Unit] = []
    aliases: dict[str, str] = {}
    first_of = {name: names[0] for names in ties(state) for name in names}
    source_of = {names[0]: next(targets[n] for n in names if n in targets) for names in ties(state)}
    guarded = False
    for name, tensor in state.items():
        if first_of[name] != name:
            aliases[name] = first_of[name]
            continue
        target, choice = source_of[name], choices.get(id(tensor))
        if choice is None:
            parts, entry = [Part(name, target.dtype, target.shape)], json.dumps({"_type": "Tensor"})
        else:
            parts, entry = _quantized_parts(name, choice, target.dtype)
            if not guarded and takes_guard(name):
                parts.append(Part(name, GUARD.dtype, tuple(GUARD.shape)))
                guarded = True
        rows = _rows_at_a_time(target, choice)
        units.append(Unit(len(units), name, target, choice, tuple(parts), entry, rows))
    return units, aliases


def _quantized_parts(name: str, choice: Choice, dtype: torch.dtype) -> tuple[list[Part], str]:
    tensors, entry = flatten(name, template(choice, dtype))
    others, _ = flatten(name, template(choice, dtype, OTHER))
    is_open = {key: others[key].dtype != tensor.dtype for key, tensor in tensors.items()}
    return [Part(key, t.dtype, tuple(t.shape), is_open[key]) for key, t in tensors.items()], entry


def _rows_at_a_time(target: Target, choice: Choice | None) -> int | None:
    if not target.is_plain or target.nbytes_read <= PIECE_BYTES or not target.shape or target.shape[0] < 2:
        return None
    if choice is not None and not rows_are_independent(choice):
        return None
    return max(1, PIECE_BYTES * target.shape[0] // target.nbytes_read)


def _in_batches(sizes: Sequence[int]) -> list[slice]:
    firsts, size = [0], 0
    for place, nbytes in enumerate(sizes):
        if size >= BATCH_BYTES:
            firsts.append(place)
            size = 0
        size += nbytes
    return [slice(first, last) for first, last in zip(firsts, [*firsts[1:], len(sizes)], strict=True)]
