"""collect_quantization_debug_info: settings, ranges and error of each quantized module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqtensor.diagnostics.table import text_table
from hqqtensor.formats import get_format
from hqqtensor.packing import unpack
from hqqtensor.tensor import HQQTensor


@dataclass(frozen=True)
class ModuleDebugInfo:
    """One quantized weight; the settings are those of ``HqqConfig``.

    shape: the logical one. bits_per_weight: metadata counted. nbytes: of all its data. scale_range, zero_range:
    smallest and largest; no zero_range for formats without zero points. saturated: share of codes that stand for the
    lowest or the highest value. relative_error: sum of squared differences to the original over the sum of its squares;
    None without an original.
    """

    name: str
    shape: list[int]
    nbits: int
    group_size: int
    axis: int
    format: str
    bits_per_weight: float
    nbytes: int
    scale_range: tuple[float, float]
    zero_range: tuple[float, float] | None
    saturated: float
    relative_error: float | None


@dataclass(frozen=True)
class QuantizationDebugInfo:
    """``modules``: one entry for each quantized weight, in the order of the model."""

    modules: list[ModuleDebugInfo]

    @property
    def relative_error(self) -> float | None:
        """Mean of the modules' errors; None without originals or modules."""
        errors = [m.relative_error for m in self.modules if m.relative_error is not None]
        return sum(errors) / len(errors) if errors else None

    def __str__(self) -> str:
        if not self.modules:
            return "no quantized weights"
        header = ("module", "shape", "bits", "group", "axis", "bits/weight", "end codes", "error")
        rows = [
            (
                m.name,
                "x".join(map(str, m.shape)),
                str(m.nbits),
                str(m.group_size),
                str(m.axis),
                f"{m.bits_per_weight:.3f}",
                f"{m.saturated:.1%}",
                "-" if m.relative_error is None else f"{m.relative_error:.2e}",
            )
            for m in self.modules
        ]
        return text_table(header, rows)


def _plain(t: Tensor) -> Tensor:
    return t.dequantize() if isinstance(t, HQQTensor) else t


@torch.no_grad()
def collect_quantization_debug_info(model: nn.Module, original: nn.Module | None = None) -> QuantizationDebugInfo:
    """Settings and figures of every quantized weight; ``original`` is the dense model, for the error.

    KeyError where ``original`` lacks a parameter that is quantized in ``model``.
    """
    dense = None if original is None else dict(original.named_parameters(remove_duplicate=False))
    infos = []
    for name, weight in model.named_parameters():
        if not isinstance(weight, HQQTensor):
            continue
        error = None
        if dense is not None:
            if name not in dense:
                raise KeyError(f"the original model has no parameter {name}")
            original_weight = dense[name].detach().to(weight.device, torch.float32)
            difference = weight.dequantize(torch.float32) - original_weight
            error = (difference.square().sum() / original_weight.square().sum()).item()
        qdata = weight.operand().qdata
        fmt, scale = get_format(weight.format), _plain(weight.scale)
        zero = None if weight.zero_point is None or not fmt.has_zero_point else _plain(weight.zero_point)
        codes = unpack(qdata, weight.nbits, weight.in_features)
        low, high = fmt.ends(weight.nbits)
        ends = ((codes == low) | (codes == high)).float().mean().item()
        infos.append(
            ModuleDebugInfo(
                name.removesuffix(".weight"),
                list(weight.shape),
                weight.nbits,
                weight.group_size,
                weight.axis,
                weight.format,
                8 * weight.nbytes / weight.numel(),
                weight.nbytes,
                (scale.min().item(), scale.max().item()),
                None if zero is None else (zero.min().item(), zero.max().item()),
                ends,
                error,
            )
        )
    return QuantizationDebugInfo(infos)
