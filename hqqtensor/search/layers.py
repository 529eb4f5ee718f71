"""What the search chooses settings for, which settings it tries, and in which order it measures."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.selection import choose

_META = {"quant_scale": True, "quant_zero": True}
CANDIDATES: tuple[dict[str, Any], ...] = (
    *({"nbits": b, "group_size": g, **_META, "meta_nbits": 4} for b in (2, 3, 4) for g in (16, 32, 64, 128)),
    *({"nbits": b, "group_size": 64, **_META, "meta_nbits": 8} for b in (2, 3, 4, 5, 6, 8)),
)
"""Settings tried for each layer in the default search: 2 to 8 bits, groups of 16 to 128.

Up to 4 bits 4-bit metadata gives less error for the same bits a weight; 8-bit metadata is for layers whose rows differ
much in size, and for codes of more than 4 bits.
"""

LEARNED: tuple[dict[str, Any], ...] = tuple(
    {"nbits": b, "group_size": g, "format": "codebook", "quant_scale": True, "quant_zero": False, "meta_nbits": 4}
    for b, g in ((2, 8), (2, 16), (2, 32), (3, 32), (3, 64))
)
"""More candidates, learned entries with 4-bit scales: less error than integers up to 3.2 bits, and slow to find."""

EMBEDDINGS: tuple[dict[str, Any], ...] = tuple({"embedding_nbits": b} for b in (8, 6, 5, 4, 3, 2))
"""More candidates, for the input embedding and the output layer alone: the settings of ``HqqConfig.embedding_nbits``.

With ``(*CANDIDATES, *EMBEDDINGS)`` the search chooses for these two as well, and a budget counts them.
"""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight ``[N, K]`` to choose settings for.

    modules: names of all modules that use it, ``name`` the first. configs: its settings under each candidate; None
    where the candidate is not for it or has groups longer than the weight.
    """

    name: str
    modules: tuple[str, ...]
    weight: nn.Parameter
    is_embedding: bool
    configs: tuple[HqqConfig | None, ...]

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """What layers of the same role in other blocks share: the name with its numbers left out, and the shape."""
        return re.sub(r"\d+", "*", self.name), tuple(self.weight.shape)


def base_of(config: HqqConfig | None) -> HqqConfig:
    """What candidates share: ``config``, with column scales where it names no solver and can have them."""
    config = config or HqqConfig()
    given = config.given_groups()
    if given["solver"] is not None or config.axis == 0 or config.rotation:
        return config
    return dataclasses.replace(config, **given | {"solver": "column_scaled"})


def layers_of(model: nn.Module, config: HqqConfig, candidates: Sequence[dict[str, Any]]) -> list[Layer]:
    """The weights ``[N, K]`` that ``quantize_(model, config)`` would take, in the model's order.

    Those that ``embedding_nbits`` serves are among them if ``candidates`` has settings for them, whatever ``config``
    says. ValueError naming a layer that no candidate fits.
    """
    widths = [candidate["embedding_nbits"] for candidate in candidates if "embedding_nbits" in candidate]
    if widths:
        config = dataclasses.replace(config, embedding_nbits=widths[0])
    configs = _candidate_configs(config, candidates)
    layers = []
    for choice in choose(model, config)[0]:
        shape = choice.weight.shape
        if len(shape) != 2 or choice.transposed or (choice.is_embedding and not widths):
            continue
        owners = [full.rpartition(".") for full in choice.names]
        modules = tuple(name for name, _, leaf in owners if leaf == "weight")
        usable = tuple(
            _for_embedding(config, candidate, shape[1]) if choice.is_embedding else fitting(settings, shape)
            for candidate, settings in zip(candidates, configs, strict=True)
        )
        if not any(usable):
            raise ValueError(f"{modules[0]}: none of the candidates' group sizes fits a weight of shape {list(shape)}")
        layers.append(Layer(modules[0], modules, choice.weight, choice.is_embedding, usable))
    return layers


def _candidate_configs(config: HqqConfig, candidates: Sequence[dict[str, Any]]) -> list[HqqConfig | None]:
    """``config`` with each candidate's settings, None for one of embeddings; ValueError where HqqConfig refuses.

    A candidate is read as an entry of dynamic_config is: one with a group size has plain scales unless it, or what
    ``config`` was made of, says otherwise.
    """
    shared = {k: v for k, v in config.to_dict().items() if k not in ("dynamic_config", "embedding_nbits")}
    shared |= config.given_groups()
    return [None if "embedding_nbits" in c else HqqConfig.from_dict({**shared, **c}) for c in candidates]


def _for_embedding(config: HqqConfig, candidate: dict[str, Any], in_features: int) -> HqqConfig | None:
    """Settings that a candidate of embeddings gives to one; None for any other candidate."""
    bits = candidate.get("embedding_nbits")
    return None if bits is None else dataclasses.replace(config, embedding_nbits=bits).for_embedding(in_features)


def fitting(config: HqqConfig | None, shape: Sequence[int]) -> HqqConfig | None:
    """``config`` where its groups are no longer than the side of a weight ``[N, K]`` that they run along, else None."""
    if config is None or config.group_size is None:
        return config
    return config if config.group_size <= shape[-1 if config.axis == 1 else -2] else None


def measuring_order(layers: Sequence[Layer]) -> list[Layer]:
    """Embeddings, then a layer of each kind in turn: of the first block, the last, the middle one, and so on.

    Wherever measuring stops, each kind of layers is known at about the same number of depths, far apart.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[Layer]] = {}
    for layer in layers:
        if not layer.is_embedding:
            kinds.setdefault(layer.kind, []).append(layer)
    turns = itertools.zip_longest(*([of_kind[i] for i in spread(len(of_kind))] for of_kind in kinds.values()))
    embeddings = [layer for layer in layers if layer.is_embedding]
    return embeddings + [layer for turn in turns for layer in turn if layer is not None]


def spread(count: int) -> list[int]:
    """The numbers below ``count``: both ends, then the middles of what lies between those before."""
    order, gaps = sorted({0, count - 1}), [(0, count - 1)]
    for low, high in gaps:  # the list grows meanwhile
        middle = (low + high) // 2
        if low < middle:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order
