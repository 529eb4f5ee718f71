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
from hqqtensor.search.sensitivity import CANDIDATES, Sensitivity, candidate_configs, check_fits, fits
from hqqtensor.selection import choose, selected_weights
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
    """A target for the weights ``[N, K]`` of a model, by module name, as bytes of the quantized weights."""

    def __init__(
        self,
        model: nn.Module,
        config: HqqConfig,
        weights: dict[str, nn.Parameter],
        target_bpw: float | None,
        target_bytes: int | None,
    ) -> None:
        if (target_bpw is None) == (target_bytes is None):
            raise ValueError("give one of target_bpw and target_bytes")
        if not weights:
            raise ValueError("the model has no weights to choose settings for outside skip_modules")
        others = [choice for choice in choose(model, config)[0] if choice.is_embedding]
        fixed_bytes = {id(choice.weight): stored_bytes(choice.matrix_shape(), choice.settings) for choice in others}
        fixed_bytes |= {id(weight): 0 for weight in weights.values()}
        self.weights = sum(weight.numel() for weight in weights.values())
        self.rest_bytes = sum(fixed_bytes.get(id(p), p.numel() * p.element_size()) for p in model.parameters())
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
    config = config or HqqConfig()
    weights = selected_weights(model, config)
    target = _Target(model, config, weights, target_bpw, target_bytes)
    configs, smallest, largest = candidate_configs(config, candidates), 0, 0
    for name, weight in weights.items():
        check_fits(name, weight.shape, configs)
        usable = [c for c in configs if fits(weight.shape, c)]
        smallest += min(stored_bytes(weight.shape, c, torch.float16) for c in usable)
        largest += max(stored_bytes(weight.shape, c, torch.float32) for c in usable)
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
    target_bytes: of the whole model, all other parameters counted (those of embedding_nbits in its bits). Exactly one
    of the two. ValueError for a budget that cannot be met (it names the smallest and the largest; ``check_target``
    tells before measuring) or a layer that was not measured.
    """
    config = config or HqqConfig()
    weights = selected_weights(model, config)
    target = _Target(model, config, weights, target_bpw, target_bytes)
    missing = [name for name in weights if name not in sensitivity.layers]
    if missing:
        raise ValueError(f"{missing[0]}: not in the sensitivities ({len(missing)} such); measure this model")
    layers = [sensitivity.layers[name] for name in weights]
    usable = [[i for i, nbytes in enumerate(layer["bytes"]) if nbytes is not None] for layer in layers]
    options = [
        [(layer["bytes"][i], layer["loss"][i]) for i in each] for layer, each in zip(layers, usable, strict=True)
    ]
    sizes = [[nbytes for nbytes, _ in each] for each in options]
    target.check(sum(map(min, sizes)), sum(map(max, sizes)))

    best = best_choice(options, target.budget)
    nbytes = sum(each[k][0] for each, k in zip(options, best, strict=True))
    loss = sum(each[k][1] for each, k in zip(options, best, strict=True))
    candidates = [sensitivity.candidates[each[k]] for each, k in zip(usable, best, strict=True)]
    counts = Counter(_label(candidate) for candidate in candidates)
    tags = {**(config.dynamic_config or {}), **_tags(model, list(weights.values()), candidates)}
    layer_config = dataclasses.replace(config, dynamic_config=tags, **config.given_groups())
    return Choice(layer_config, nbytes, 8 * nbytes / target.weights, loss, dict(sorted(counts.items())))


def _tags(
    model: nn.Module, weights: Sequence[nn.Parameter], candidates: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """``dynamic_config`` with the candidate of each weight, for every module that uses it."""
    by_id = {id(weight): dict(candidate) for weight, candidate in zip(weights, candidates, strict=True)}
    return {
        name: by_id[id(module.weight)]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "weight", None), nn.Parameter) and id(module.weight) in by_id
    }


def _label(candidate: dict[str, Any]) -> str:
    """A candidate in a few words, such as "3-bit g32, 4-bit metadata"."""
    parts = [f"{candidate['nbits']}-bit g{candidate['group_size']}"]
    parts += [candidate["format"]] if candidate.get("format", "int") != "int" else []
    parts += [f"{candidate['meta_nbits']}-bit metadata"] if "meta_nbits" in candidate else []
    return ", ".join(parts)
