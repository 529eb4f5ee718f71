"""From the weights that vLLM's loader hands over, one after another, to what a layer runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.config import HqqConfig
from hqqtensor.integrations.vllm.files import Reading
from hqqtensor.integrations.vllm.parts import DensePart, PackedPart
from hqqtensor.integrations.vllm.settings import names_of_rows, settings_for
from hqqtensor.integrations.vllm.slices import cut_columns
from hqqtensor.kernels.cpu.arena import gathered
from hqqtensor.tensor import HQQTensor

SHARDS = {"q": 0, "k": 1, "v": 2}
"""Names that vLLM gives to the weights of a joined attention layer."""


@dataclass(frozen=True)
class Online:
    """How dense weights of one layer are quantized while they are loaded. packed, prefix: see ``names_of_rows``."""

    settings: HqqConfig
    packed: dict[str, list[str]]
    prefix: str

    def quantized(self, weight: Tensor, place: int | None, dtype: torch.dtype, is_embedding: bool = False) -> Tensor:
        """``weight`` as it is to be kept: quantized already, quantized now, or dense."""
        if Reading.holds_quantized or isinstance(weight, HQQTensor) or not weight.is_floating_point():
            return weight
        name = names_of_rows(self.prefix, self.packed, place)
        settings = settings_for(self.settings, name, weight.shape[-1], is_embedding)
        if settings is None:
            return weight
        try:
            return HQQTensor.from_hp(weight.to(dtype), settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None


@dataclass
class Arrived:
    """The weights of one layer so far, with the loader's name of each. Layers that are tied share it: the first that is
    turned into what runs leaves its ``part`` to the others, or itself as ``dense_twin``."""

    weights: list[tuple[Any, Tensor]] = field(default_factory=list)
    dense_twin: nn.Module | None = None
    part: nn.Module | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return not any(isinstance(weight, HQQTensor) for _, weight in self.weights)

    def check(self, prefix: str, joined: int = 1) -> None:
        """ValueError naming the layer where the checkpoint lacks it, or some of the ``joined`` weights that it has."""
        shards = {shard for shard, _ in self.weights}
        single = {shard for shard in shards if isinstance(shard, int | str)}
        if not shards or (shards == single and len(shards) < joined):
            raise ValueError(f"{prefix}: the checkpoint has {len(shards)} of the {joined} weights of this layer")


def placeholder(layer: nn.Module, name: str, dtype: torch.dtype, loader: Callable[..., Any]) -> Arrived:
    """Register an empty parameter ``name`` on vLLM's device whose weights ``loader(shard, weight)`` gets."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    arrived = Arrived()

    def weight_loader(param: nn.Parameter, loaded_weight: Tensor, shard_id: Any = None) -> None:
        arrived.weights.append((shard_id, loader(shard_id, loaded_weight)))

    parameter.weight_loader = weight_loader  # type: ignore[attr-defined]
    parameter.arrived = arrived  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)
    return arrived


def check_matrix(weight: Tensor, prefix: str) -> None:
    """ValueError naming the layer where ``weight`` is no matrix of rows of in_features."""
    if weight.ndim != 2 or (isinstance(weight, HQQTensor) and weight.transposed):
        kind = repr(weight) if isinstance(weight, HQQTensor) else f"{list(weight.shape)}"
        raise ValueError(f"{prefix}: vLLM wants a matrix [out_features, in_features], got {kind}")


def part_of(weight: Tensor, columns: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Any:
    """What runs the columns ``[start, end)`` of a weight, on vLLM's device. Dense numbers get ``dtype``."""
    piece, before, after = cut_columns(weight, *columns)
    if isinstance(piece, HQQTensor):
        return PackedPart(piece.to(device), before, after)
    return DensePart(piece.to(device, dtype).contiguous())


class Gathering:
    """Counts the layers of a model that are still to be loaded; after the last, brings all parts together in memory.

    Packed data that is mapped from a file, or was cut out of it, is copied into memory that the kernels read fastest,
    which frees the rest of the file's pages.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.parts: list[nn.Module] = []

    def expect(self) -> None:
        """Another layer is to be loaded."""
        self.waiting += 1

    def done(self, part: nn.Module | None) -> None:
        """A layer is loaded, and runs ``part`` if it is quantized."""
        self.waiting -= 1
        if part is not None:
            self.parts.append(part)
        if self.waiting == 0:
            gather(self.parts)
            self.parts = []


def gather(parts: list[nn.Module]) -> None:
    """Copy the buffers of all parts that lie in the CPU's memory to where the kernels read them fastest."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for part in parts:
        for module in part.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "cpu":
                    places.setdefault(id(buffer), []).append((module, name))
                    tensors[id(buffer)] = buffer
    copies = gathered([tensor.contiguous() for tensor in tensors.values()])
    for key, copy in zip(tensors, copies, strict=True):
        for module, name in places[key]:
            module._buffers[name] = copy
