"""check_quantization_status: what of a model is quantized, and how."""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from hqqtensor.diagnostics.size import ModelSize, model_size
from hqqtensor.diagnostics.table import megabytes, text_table
from hqqtensor.tensor import HQQTensor


@dataclass(frozen=True)
class QuantizationStatus:
    """quantized: {module: settings in words}. dense: {module: shape} of weights of rank 2 or more that are not.

    bits: how many modules have each width. size: see ``ModelSize``.
    """

    quantized: dict[str, str]
    dense: dict[str, list[int]]
    bits: dict[int, int]
    size: ModelSize

    def __str__(self) -> str:
        groups = Counter(self.quantized.values())
        rows = [(settings, str(count)) for settings, count in groups.most_common()]
        rows += [("dense", str(len(self.dense)))]
        share = self.size.quantized_weights / max(1, self.size.parameters)
        lines = [
            text_table(("weights", "modules"), rows),
            f"{self.size.parameters:,} parameters, {share:.1%} of them quantized; "
            f"{megabytes(self.size.dense_nbytes)} dense, {megabytes(self.size.nbytes)} now",
        ]
        if self.quantized:
            lines.append(f"{self.size.bits_per_weight:.3f} bits a quantized weight, metadata counted")
        if self.dense:
            shown = ", ".join(list(self.dense)[:5]) + (", ..." if len(self.dense) > 5 else "")
            lines.append(f"left dense: {shown}")
        return "\n".join(lines)


def check_quantization_status(model: nn.Module) -> QuantizationStatus:
    """Which weights of ``model`` are quantized; a module is listed for its ``weight``."""
    quantized: dict[str, str] = {}
    dense: dict[str, list[int]] = {}
    bits: Counter[int] = Counter()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, HQQTensor):
            quantized[name] = weight.describe()
            bits[weight.nbits] += 1
        elif isinstance(weight, Tensor) and weight.ndim >= 2:
            dense[name] = list(weight.shape)
    return QuantizationStatus(quantized, dense, dict(sorted(bits.items())), model_size(model))
