"""From sensitivities and a budget to a config with settings for each layer."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.search.knapsack import best_choice
from hqqtensor.search.layers import CANDIDATES, Layer, base_of, layers_of
from hqqtensor.search.sensitivity import Sensitivity
from hqqtensor.selection import choose
from hqqtensor.stored_size import stored_bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """config: for ``quantize_``. nbytes: of the quantized weights. bits_per_weight: theirs, metadata counted.

    loss: the sum of the layers' losses. counts: how many layers have each setting.
    """

    config: HqqConfig
    nbytes: int
    bits_per_weight: float
    loss: float
    counts: dict[str, int]


class _Target:
    """A target for the layers that settings are chosen for, as bytes of their quantized weights."""

    def __init__(
        self,
        model: nn.Module,
        config: HqqConfig,
        layers: Sequence[Layer],
        target_bpw: float | None,
        target_bytes: int | None,
    ) -> None:
        if (target_bpw is None) == (target_bytes is None):
            raise ValueError("give one of target_bpw and target_bytes")
        if not layers:
            raise ValueError("the model has no weights to choose settings for outside skip_modules")
        other_bytes = {id(c.weight): stored_bytes(c.matrix_shape(), c.settings) for c in choose(model, config)[0]}
        other_bytes |= {id(layer.weight): 0 for layer in layers}
        self.weights = sum(layer.weight.numel() for layer in layers)
        self.rest_bytes = sum(other_bytes.get(id(p), p.numel() * p.element_size()) for p in model.parameters())
        if target_bpw is not None:
            if not 0 < target_bpw < math.inf:
                raise ValueError(f"target_bpw must be over 0 and finite, got {target_bpw}")
            self.text, self.budget = f"{target_bpw} bits", int(target_bpw * self.weights / 8)
        else:
            assert target_bytes is not None
            self.text, self.budget = f"{target_bytes} bytes", int(target_bytes) - self.rest_bytes

    def check(self, smallest: int, largest: int) -> None:
        """ValueError where ``smallest`` is over the budget, naming what can be had: bytes of the quantized weights."""
        if smallest > self.budget:
            raise ValueError(
                f"the budget is too small: the smallest settings take {self._describe(smallest)}, the largest "
                f"{self._describe(largest)}, the target is {self.text}"
            )

    def _describe(self, nbytes: int) -> str:
        return (
            f"{8 * nbytes / self.weights:.3f} bits a weight "
            f"({nbytes + self.rest_bytes} bytes with all other parameters)"
        )


def check_target(
    model: nn.Module,
    config: HqqConfig | None = None,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
    candidates: Sequence[dict[str, Any]] = CANDIDATES,
) -> None:
    """ValueError for a target that no choice among ``candidates`` meets, told from shapes before anything is measured.

    Arguments as of ``choose_config`` and ``measure_sensitivity``; ``model`` may be on the meta device. The message
    gives the smallest and the largest size that can be reached. Where a candidate leaves the dtype of its scales to
    the weight's numbers, float16 counts for the smallest size and float32 for the largest.
    """
    config = base_of(config)
    layers = layers_of(model, config, candidates)
    target = _Target(model, config, layers, target_bpw, target_bytes)
    smallest = largest = 0
    for layer in layers:
        usable = [settings for settings in layer.configs if settings is not None]
        smallest += min(stored_bytes(layer.weight.shape, settings, torch.float16) for settings in usable)
        largest += max(stored_bytes(layer.weight.shape, settings, torch.float32) for settings in usable)
    target.check(smallest, largest)


def choose_config(
    model: nn.Module,
    sensitivity: Sensitivity,
    config: HqqConfig | None = None,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
) -> Choice:
    """The settings of least total loss within a budget, exactly.

    config: as given to ``measure_sensitivity``. target_bpw: bits a weight of the layers chosen for, metadata counted.
    target_bytes: of the whole model, all other parameters counted as ``config`` has them. Exactly one of the two.
    Where ``EMBEDDINGS`` were among the candidates measured, the input embedding and the output layer are chosen for,
    too: embedding_nbits of the result is theirs, or the larger of the two.

    ValueError for a budget that cannot be met (it names the smallest and the largest; ``check_target`` tells before
    measuring) or a layer that was not measured.
    """
    config = base_of(config)
    layers = layers_of(model, config, sensitivity.candidates)
    target = _Target(model, config, layers, target_bpw, target_bytes)
    missing = [layer.name for layer in layers if layer.name not in sensitivity.layers]
    if missing:
        raise ValueError(f"{missing[0]}: not in the sensitivities ({len(missing)} such); measure this model")
    entries = [sensitivity.layers[layer.name] for layer in layers]
    usable = [[i for i, nbytes in enumerate(entry["bytes"]) if nbytes is not None] for entry in entries]
    options = [
        [(entry["bytes"][i], entry["loss"][i]) for i in each] for entry, each in zip(entries, usable, strict=True)
    ]
    sizes = [[nbytes for nbytes, _ in each] for each in options]
    target.check(sum(map(min, sizes)), sum(map(max, sizes)))

    best = best_choice(options, target.budget)
    nbytes = sum(each[k][0] for each, k in zip(options, best, strict=True))
    loss = sum(each[k][1] for each, k in zip(options, best, strict=True))
    chosen = [each[k] for each, k in zip(usable, best, strict=True)]
    counts = Counter(_label(sensitivity.candidates[i]) for i in chosen)
    layer_config = _with_settings(config, layers, chosen, sensitivity.candidates)
    return Choice(layer_config, nbytes, 8 * nbytes / target.weights, loss, dict(sorted(counts.items())))


def _with_settings(
    config: HqqConfig, layers: Sequence[Layer], chosen: Sequence[int], candidates: Sequence[dict[str, Any]]
) -> HqqConfig:
    """``config`` with a tag for every module that uses one of ``layers``, and embedding_nbits where those are chosen.

    chosen: for each layer the place of its candidate.
    """
    widths = [candidates[i]["embedding_nbits"] for i in chosen if "embedding_nbits" in candidates[i]]
    embedding_nbits = max(widths, default=config.embedding_nbits)
    tags: dict[str, dict[str, Any] | None] = dict(config.dynamic_config or {})
    for layer, i in zip(layers, chosen, strict=True):
        settings = layer.configs[i]
        if not layer.is_embedding:
            tags |= {name: dict(candidates[i]) for name in layer.modules}
        elif settings is not None and candidates[i]["embedding_nbits"] != embedding_nbits:
            for_all = ("dynamic_config", "skip_modules", "embedding_nbits")
            entry = {name: value for name, value in settings.to_dict().items() if name not in for_all}
            tags |= {name: dict(entry) for name in layer.modules}
    return dataclasses.replace(
        config, dynamic_config=tags or None, embedding_nbits=embedding_nbits, **config.given_groups()
    )


def _label(candidate: dict[str, Any]) -> str:
    """A candidate in a few words, such as "3-bit g32, 4-bit metadata"."""
    if "embedding_nbits" in candidate:
        return f"{candidate['embedding_nbits']}-bit embedding"
    parts = [f"{candidate['nbits']}-bit g{candidate['group_size']}"]
    parts += [candidate["format"]] if candidate.get("format", "int") != "int" else []
    parts += [f"{candidate['meta_nbits']}-bit metadata"] if "meta_nbits" in candidate else []
    return ", ".join(parts)
