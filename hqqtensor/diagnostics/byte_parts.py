"""Where the bytes of a model are: layers, embedding, output layer, and what is dense; codes apart from metadata."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.packing import row_bytes
from hqqtensor.selection import choose, output_layers
from hqqtensor.serialization.inspect import CheckpointInfo
from hqqtensor.stored_size import stored_bytes

LAYERS, EMBEDDING, OUTPUT, TIED, DENSE = (
    "layers", "embedding", "output layer", "embedding and output layer", "left dense",
)  # fmt: skip
_ORDER = (LAYERS, TIED, EMBEDDING, OUTPUT, DENSE)


@dataclass(frozen=True)
class BytePart:
    """One part of a model: its weights, the bytes of their codes, and those of scales and zero points.

    Weights that are dense have no metadata: ``code_bytes`` are all of theirs.
    """

    name: str
    weights: int
    code_bytes: int
    metadata_bytes: int

    @property
    def nbytes(self) -> int:
        """All bytes of the part."""
        return self.code_bytes + self.metadata_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, metadata counted."""
        return 8 * self.nbytes / self.weights


def parts_of_checkpoint(info: CheckpointInfo, empty: nn.Module) -> list[BytePart]:
    """The parts of a checkpoint; ``empty`` is its model, perhaps on the meta device, which says what each weight is."""
    roles = roles_of(empty)
    return _sums(
        (
            roles.get(t.name, LAYERS if t.kind == "hqq" else DENSE),
            math.prod(t.shape),
            t.code_bytes,
            t.nbytes - t.code_bytes,
        )
        for t in info.tensors
    )


def parts_when_quantized(model: nn.Module, config: HqqConfig) -> list[BytePart]:
    """The parts of ``quantize_(model, config)``'s result; ``model`` may be on the meta device, in its real dtype."""
    roles = roles_of(model)
    chosen = {id(choice.weight): choice for choice in choose(model, config)[0]}
    entries = []
    for name, parameter in model.named_parameters():
        choice = chosen.get(id(parameter))
        if choice is None:
            entries.append((roles.get(name, DENSE), parameter.numel(), parameter.nbytes, 0))
            continue
        *lead, in_features = choice.matrix_shape()
        codes = math.prod(lead) * row_bytes(in_features, choice.settings.nbits)
        metadata = stored_bytes(choice.matrix_shape(), choice.settings) - codes
        entries.append((roles.get(name, LAYERS), parameter.numel(), codes, metadata))
    return _sums(entries)


def roles_of(model: nn.Module) -> Mapping[str, str]:
    """By the name of their weights: input embedding and output layer of a transformers model, or both where tied."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        inputs = get() if callable(get) else None
    except NotImplementedError:
        inputs = None
    embedding = id(getattr(inputs, "weight", None))
    outputs = {id(getattr(model.get_submodule(name), "weight", None)) for name in output_layers(model)}
    roles = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) == embedding:
            roles[name] = TIED if embedding in outputs else EMBEDDING
        elif id(parameter) in outputs:
            roles[name] = OUTPUT
    return roles


def _sums(entries: Iterable[tuple[str, int, int, int]]) -> list[BytePart]:
    """One part for each role, of entries (role, weights, bytes of codes, bytes of metadata)."""
    totals: dict[str, list[int]] = {}
    for role, *numbers in entries:
        before = totals.get(role, [0, 0, 0])
        totals[role] = [a + b for a, b in zip(before, numbers, strict=True)]
    return [BytePart(name, *totals[name]) for name in _ORDER if name in totals and totals[name][0] > 0]
