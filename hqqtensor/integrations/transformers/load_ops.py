"""The two operations that transformers runs on a weight while it loads: quantize it, or put the packed one in place."""

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps


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
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        return {full_layer_name: nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)}
