"""What of a quantized model is dense, and what quantizing it would save."""

import dataclasses
from dataclasses import dataclass

from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.selection import choose
from hqqtensor.stored_size import stored_bytes
from hqqtensor.tensor import HQQTensor

EMBEDDING_NBITS = 8
"""Bits that an embedding is counted with where the config has none for it."""


@dataclass(frozen=True)
class DenseGroup:
    """Dense weights of the same name but for numbers, which are "*" in ``names`` (several where the weight is tied).

    count, nbytes: number of these weights, and the bytes of all. saving: how many of the bytes would be saved if they
    were quantized with the settings of the other layers, or as an embedding; 0 for what is not quantized by default
    (norms, biases, convolutions), which is one group named "others".
    """

    names: list[str]
    count: int
    nbytes: int
    saving: int

    def __str__(self) -> str:
        times = f" ({self.count})" if self.count > 1 else ""
        text = f"{' = '.join(self.names)}{times}: {megabytes(self.nbytes)}"
        return f"{text}, quantizing would save {megabytes(self.saving)}" if self.saving else text


def left_dense(model: nn.Module, config: HqqConfig) -> list[DenseGroup]:
    """The dense parameters of ``model``, which was quantized with ``config``, the largest group first."""
    nbits = EMBEDDING_NBITS if config.embedding_nbits is None else config.embedding_nbits
    unskipped = dataclasses.replace(config, skip_modules=[], dynamic_config=None, embedding_nbits=nbits)
    groups: dict[tuple[str, ...], tuple[int, int, int]] = {}
    seen: set[int] = set()

    def add(names: tuple[str, ...], nbytes: int, saving: int) -> None:
        before = groups.get(names, (0, 0, 0))
        groups[names] = (before[0] + 1, before[1] + nbytes, before[2] + saving)

    for choice in choose(model, unskipped)[0]:
        seen.add(id(choice.weight))
        saving = max(0, choice.weight.nbytes - stored_bytes(choice.matrix_shape(), choice.settings))
        add(tuple(_pattern(name) for name in choice.names), choice.weight.nbytes, saving)
    for parameter in model.parameters():
        if not isinstance(parameter, HQQTensor) and id(parameter) not in seen:
            add(("others",), parameter.nbytes, 0)
    found = [DenseGroup(list(names), *counts) for names, counts in groups.items()]
    return sorted(found, key=lambda group: -group.nbytes)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
