"""From sensitivities and a budget to a config with settings for each layer."""

import dataclasses
from collections import Counter
from typing import Any

from torch import nn

from hqqtensor.config import HqqConfig
from hqqtensor.search.knapsack import best_choice
from hqqtensor.search.sensitivity import Sensitivity
from hqqtensor.selection import selected_weights


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


def choose_config(
    model: nn.Module,
    sensitivity: Sensitivity,
    config: HqqConfig | None = None,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
) -> Choice:
    """The settings of least total loss within a budget, exactly.

    config: as given to ``measure_sensitivity``. target_bpw: bits a quantized weight, metadata counted. target_bytes: of
    the whole model, what stays dense counted. Exactly one of the two. ValueError for a budget that cannot be met (it
    names the smallest one) or a layer that was not measured.
    """
    config = config or HqqConfig()
    if (target_bpw is None) == (target_bytes is None):
        raise ValueError("give one of target_bpw and target_bytes")
    weights = selected_weights(model, config)
    missing = [name for name in weights if name not in sensitivity.layers]
    if missing:
        raise ValueError(f"{missing[0]}: not in the sensitivities ({len(missing)} such); measure this model")
    numbers = sum(w.numel() for w in weights.values())
    taken = {id(w) for w in weights.values()}
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in taken)
    if target_bpw is not None:
        if not target_bpw > 0:
            raise ValueError(f"target_bpw must be over 0, got {target_bpw}")
        budget = int(target_bpw * numbers / 8)
    else:
        assert target_bytes is not None
        budget = int(target_bytes) - dense
    options, indices = [], []
    for name in weights:
        entry = sensitivity.layers[name]
        fits = [i for i, size in enumerate(entry["bytes"]) if size is not None]
        indices.append(fits)
        options.append([(entry["bytes"][i], entry["loss"][i]) for i in fits])
    least = sum(min(size for size, _ in each) for each in options)
    if least > budget:
        raise ValueError(
            f"the budget is too small: the smallest settings take {8 * least / numbers:.3f} bits a weight "
            f"({least + dense} bytes with all that stays dense), the target is "
            + (f"{target_bpw} bits" if target_bpw is not None else f"{target_bytes} bytes")
        )
    chosen = [fits[k] for fits, k in zip(indices, best_choice(options, budget), strict=True)]
    names = list(weights)
    layers = {name: dict(sensitivity.candidates[i]) for name, i in zip(names, chosen, strict=True)}
    sizes = [sensitivity.layers[name]["bytes"][i] for name, i in zip(names, chosen, strict=True)]
    loss = sum(sensitivity.layers[name]["loss"][i] for name, i in zip(names, chosen, strict=True))
    counts = Counter(_label(c) for c in layers.values())
    # Every module that shares a weight needs its settings.
    setting = {id(weights[name]): layer for name, layer in layers.items()}
    tags: dict[str, dict[str, Any] | None] = {
        name: setting[id(module.weight)]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "weight", None), nn.Parameter) and id(module.weight) in setting
    }
    own = dataclasses.replace(config, dynamic_config=tags)
    return Choice(own, sum(sizes), 8 * sum(sizes) / numbers, loss, dict(sorted(counts.items())))


def _label(candidate: dict[str, Any]) -> str:
    """A candidate in a few words, such as "3-bit g32, 4-bit metadata"."""
    parts = [f"{candidate['nbits']}-bit g{candidate['group_size']}"]
    parts += [candidate["format"]] if candidate.get("format", "int") != "int" else []
    parts += [f"{candidate['meta_nbits']}-bit metadata"] if "meta_nbits" in candidate else []
    return ", ".join(parts)
