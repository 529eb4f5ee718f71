"""What every model of transformers does with weights that ``quantize_`` changed: saving, and counting its memory."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hqqtensor.integrations import patches
from hqqtensor.integrations.transformers.quantizer import HQQTensorHfQuantizer
from hqqtensor.integrations.versions import TRANSFORMERS
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.settings import common_config


def install() -> None:
    """Change two methods of ``PreTrainedModel``."""
    module, reason = "transformers.modeling_utils", "save_pretrained after quantize_"
    patches.wrap(module, "PreTrainedModel.save_pretrained", _saving_quantized, reason, TRANSFORMERS)
    reason = "get_memory_footprint of quantized models"
    patches.wrap(module, "PreTrainedModel.get_memory_footprint", _counting_packed, reason, TRANSFORMERS)


def _saving_quantized(save_pretrained: Callable) -> Callable:
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = [p for p in self.parameters() if isinstance(p, HQQTensor)]
        quantizer = getattr(self, "hf_quantizer", None)
        saves_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if weights and quantizer is None and not saves_adapters:
            with _adopted(self, weights):
                return save_pretrained(self, *args, **kwargs)
        if not weights and isinstance(quantizer, HQQTensorHfQuantizer):
            # hqqtensor.dequantize_ was called: config.json must not say that the weights are quantized.
            quantizer.release(self)
        return save_pretrained(self, *args, **kwargs)

    return save


@contextmanager
def _adopted(model: Any, weights: list[HQQTensor]) -> Iterator[None]:
    """Let ``save_pretrained`` find what ``from_pretrained`` would have left; afterwards the model is as it was.

    config.json gets the settings that most weights have; the file's entry of each weight rules when it is loaded.
    """
    config = dataclasses.replace(common_config(weights), compute_dtype=None)  # a loader's dtype argument is followed
    quantizer = HQQTensorHfQuantizer(config, pre_quantized=False)
    changes: list[tuple[Any, str, Any]] = [
        (model, "hf_quantizer", quantizer),
        # Stored under the names that the model has in memory: packed weights cannot go back through the converters.
        (model, "_weight_conversions", []),
        (model.config, "quantization_config", quantizer.quantization_config),
    ]
    before = [(owner, name, name in vars(owner), vars(owner).get(name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, was_set, value in before:
            if was_set:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def _counting_packed(get_memory_footprint: Callable) -> Callable:
    """transformers counts ``numel() * element_size()`` bytes, which is what a quantized weight takes when dense."""

    def footprint(self: Any, *args: Any, **kwargs: Any) -> int:
        excess = sum(p.numel() * p.element_size() - p.nbytes for p in self.parameters() if isinstance(p, HQQTensor))
        return get_memory_footprint(self, *args, **kwargs) - excess

    return footprint
