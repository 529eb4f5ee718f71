"""The figures of the page, JSON-safe: what every plot and table shows, and what a program may read back."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.diagnostics.debug_info import collect_quantization_debug_info
from hqqtensor.diagnostics.language import LanguageComparison
from hqqtensor.diagnostics.measured_quality import MEASURED
from hqqtensor.packing import unpack
from hqqtensor.search import Sensitivity
from hqqtensor.tensor import HQQTensor

WORST = 3
"""How many layers are shown with their weights and codes."""
BINS = 60


def layer_figures(model: nn.Module, original: nn.Module | None) -> list[dict[str, Any]]:
    """An entry for each quantized weight, in the model's order.

    number: of the decoder layer, None outside of them. kind: the last part of the module's name. saturated: share of
    codes that stand for the lowest or highest value. error: relative squared error, None without an original.
    """
    return [
        {
            "name": module.name,
            "kind": module.name.rpartition(".")[2],
            "number": layer_number(module.name),
            "shape": module.shape,
            "bits": module.nbits,
            "group_size": module.group_size,
            "format": module.format,
            "bits_per_weight": module.bits_per_weight,
            "bytes": module.nbytes,
            "saturated": module.saturated,
            "error": module.relative_error,
        }
        for module in collect_quantization_debug_info(model, original).modules
    ]


def layer_number(name: str) -> int | None:
    """The first number among the dotted parts of a name, which says the layer."""
    return next((int(part) for part in name.split(".") if re.fullmatch(r"[0-9]{1,6}", part)), None)


def worst_layers(layers: Sequence[Mapping[str, Any]], count: int = WORST) -> list[str]:
    """Names of the layers with the largest error, or where that is not known with the most codes at the ends."""
    by = "error" if layers and layers[0]["error"] is not None else "saturated"
    return [layer["name"] for layer in sorted(layers, key=lambda layer: -layer[by])[:count]]


@torch.no_grad()
def histograms(model: nn.Module, original: nn.Module | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each named module: how often each code is used, and histograms of its weights before and after.

    edges: BINS + 1 places, which hold all but the outermost weights, one in a thousand on each side.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    originals = {} if original is None else dict(original.named_parameters(remove_duplicate=False))
    out = []
    for module in names:
        name = f"{module}.weight" if f"{module}.weight" in weights else module
        weight = weights[name]
        assert isinstance(weight, HQQTensor)
        codes = unpack(weight.operand().qdata, weight.nbits, weight.in_features)
        after = weight.dequantize(torch.float32).flatten()
        before = originals[name].detach().float().flatten() if name in originals else None
        edges = _edges(after if before is None else before)
        out.append(
            {
                "name": module,
                "codes": torch.bincount(codes.flatten().int(), minlength=2**weight.nbits).tolist(),
                "edges": edges.tolist(),
                "after": torch.histogram(after, edges).hist.int().tolist(),
                "before": None if before is None else torch.histogram(before, edges).hist.int().tolist(),
            }
        )
    return out


def _edges(values: Tensor) -> Tensor:
    """Places that divide all but the outermost values into BINS equal parts."""
    sample = values[:: max(1, values.numel() // 100_000)].sort().values
    low, high = (sample[int(share * (len(sample) - 1))].item() for share in (0.001, 0.999))
    return torch.linspace(low, max(high, low + 1e-12), BINS + 1)


def sensitivity_figures(sensitivity: Sensitivity) -> dict[str, Any]:
    """Losses by layer, in the model's order, one curve for each number of bits: the smallest loss at these bits."""
    bits = [candidate.get("nbits", 4) for candidate in sensitivity.candidates]
    curves: dict[int, list[float | None]] = {}
    for width in sorted(set(bits), reverse=True):
        places = [i for i, each in enumerate(bits) if each == width]
        losses = [
            min((layer["loss"][i] for i in places if layer["loss"][i] is not None), default=None)
            for layer in sensitivity.layers.values()
        ]
        if any(loss is not None for loss in losses):
            curves[width] = losses
    return {
        "method": sensitivity.method,
        "layers": list(sensitivity.layers),
        "estimated": len(sensitivity.estimated),
        "loss": {str(width): losses for width, losses in curves.items()},
    }


def quality_figures(bits_per_weight: float, comparison: LanguageComparison | None) -> dict[str, Any]:
    """Bits and KL of measured settings of SmolLM2, and of this model where it was compared with its original."""
    points = [{"setting": name, **vars(row)} for name, row in MEASURED.items() if row.model == "SmolLM2"]
    this = None if comparison is None else {"bits": bits_per_weight, "kl": comparison.kl}
    return {"measured": points, "this": this}


def comparison_figures(comparison: LanguageComparison | None) -> dict[str, Any] | None:
    """The comparison with the original, JSON-safe."""
    return None if comparison is None else dataclasses.asdict(comparison)
