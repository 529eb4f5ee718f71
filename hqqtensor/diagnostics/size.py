"""How much memory a model's parameters take, and would take dense."""

from dataclasses import dataclass

from torch import nn

from hqqtensor.tensor import HQQTensor


@dataclass(frozen=True)
class ModelSize:
    """Parameters, shared ones counted once; buffers are left out.

    parameters, nbytes: number of all elements and their bytes. quantized_weights, quantized_nbytes: the same of
    quantized weights alone, scales and zero points included in the bytes. dense_nbytes: bytes of all if nothing were
    quantized, each parameter in the dtype that it presents.
    """

    parameters: int
    nbytes: int
    quantized_weights: int
    quantized_nbytes: int
    dense_nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a quantized weight, metadata counted; nan where nothing is quantized."""
        return 8 * self.quantized_nbytes / self.quantized_weights if self.quantized_weights else float("nan")


def model_size(model: nn.Module) -> ModelSize:
    """Count the parameters of ``model``."""
    parameters = list(model.parameters())
    quantized = [p for p in parameters if isinstance(p, HQQTensor)]
    return ModelSize(
        sum(p.numel() for p in parameters),
        sum(p.nbytes for p in parameters),
        sum(p.numel() for p in quantized),
        sum(p.nbytes for p in quantized),
        sum(p.numel() * p.dtype.itemsize for p in parameters),
    )
