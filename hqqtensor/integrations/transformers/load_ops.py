"""The two operations that transformers runs on a weight while it loads: quantize it, or put the packed one in place."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.core_model_loading import ConversionOps

from hqqtensor.tensor import HQQTensor


class _Op(ConversionOps):
    """An operation of one quantizer; transformers copies it with each converter, and a copy must see the same one."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> "_Op":
        return self


class HqqQuantize(_Op):
    """A dense weight to an HQQTensor; the dense one is let go before the next is read."""

    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **kwargs: Any) -> dict[str, Any]:
        """``input_dict``: full names and dense weights, also those that a weight of the file was split into."""
        quantizer = self.hf_quantizer
        quantizer.missing = missing_keys if missing_keys is not None else set()
        out: dict[str, Any] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight: Tensor = value[0] if isinstance(value, list) else value
            choice = quantizer.plan.get(name)
            if choice is not None and weight.shape == choice.weight.shape:
                choice.check(weight)
                out[name] = choice.quantize(weight)
                continue
            # A weight of another shape is transformers' to refuse, or with ignore_mismatched_sizes to make anew.
            for other in () if choice is None else choice.names:
                quantizer.plan.pop(other, None)
            out[name] = weight
        return out


class HqqLoad(_Op):
    """Packed codes of a checkpoint to the HQQTensor that the quantizer has read and checked."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """``input_dict``: the packed codes alone, on the device where the weight is to be."""
        packed = next(iter(input_dict.values()))
        device = (packed[0] if isinstance(packed, list) else packed).device
        tensor = self.hf_quantizer.ready[full_layer_name]
        place = model.get_parameter_or_buffer(full_layer_name)
        if isinstance(place, DTensor):
            tensor = local_shard(tensor, place, full_layer_name)
        return {full_layer_name: nn.Parameter(tensor.to(device=device, dtype=place.dtype), requires_grad=False)}


def local_shard(whole: HQQTensor, like: DTensor, name: str) -> HQQTensor:
    """A copy of the part of ``whole`` that this process holds of a parameter distributed as ``like``.

    NotImplementedError, with ``name``, where packed columns cannot be cut there or the placement is not contiguous.
    """
    if not all(type(placement) in (Shard, Replicate) for placement in like.placements):
        raise NotImplementedError(f"{name}: a quantized weight cannot be distributed as {like.placements}")
    shape, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    part = whole
    try:
        for dim, (length, first) in enumerate(zip(shape, offsets, strict=True)):
            part = part.narrow(dim, first, length)
    except NotImplementedError as error:
        raise NotImplementedError(f"{name} on {like.device_mesh.size()} processes: {error}") from None
    return part.clone()
