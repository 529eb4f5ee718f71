"""torchao's safetensors code, and so transformers' ``TorchAoConfig``, saves and loads HQQTensors.

Its files hold plain tensors under names of a fixed list, a tensor a name. A weight whose scales (or zero points) are
quantized themselves has more: it is saved as a ``QuantizedScales``, whose ``per_tensor_scale`` stacks the floats of the
scales and zero points.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hqqtensor.encode import META_GROUP
from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import TORCHAO
from hqqtensor.packing import meta_bits
from hqqtensor.tensor import HQQTensor


class QuantizedScales:
    """An HQQTensor with quantized scales or zero points, as the plain tensors that torchao's files can hold.

    qdata, zero_point, act_pre_scale: as in HQQTensor; scale and zero_point are uint8 where they are quantized.
    per_tensor_scale: ``[2 or 4, R, G]``, of each that is quantized its scales and its zero points.
    """

    tensor_data_names = ["qdata", "scale", "per_tensor_scale"]
    optional_tensor_data_names = HQQTensor.optional_tensor_data_names
    tensor_attribute_names = HQQTensor.tensor_attribute_names

    def __init__(self, tensor: HQQTensor) -> None:
        for name in (*self.tensor_attribute_names, *self.optional_tensor_data_names):
            setattr(self, name, getattr(tensor, name))
        for part in (tensor.scale, tensor.zero_point):
            if isinstance(part, HQQTensor) and (part.axis, part.group_size) != _meta_groups(part.shape):
                raise ValueError(f"torchao's files cannot hold {part!r} as the scale of {tensor!r}")
        self.qdata = tensor.qdata
        packed = tensor.operand()
        self.scale, self.zero_point = packed.scale, packed.zero_point
        self.per_tensor_scale = torch.stack(list(packed.meta or ()))


def _meta_groups(shape: torch.Size) -> tuple[int, int]:
    """Axis and group size of scales of this shape under ``quant_scale`` and ``quant_zero``."""
    return 0, min(META_GROUP, shape[-2])


def _rebuild(scale: Tensor, per_tensor_scale: Tensor, zero_point: Tensor | None = None, **data: Any) -> HQQTensor:
    """The HQQTensor that a ``QuantizedScales`` stands for."""
    floats = list(per_tensor_scale)

    def nested(values: Tensor) -> Tensor:
        if values.dtype != torch.uint8:
            return values
        axis, size = _meta_groups(values.shape)
        scale, zero = floats.pop(0), floats.pop(0)
        shape = torch.Size([*values.shape[:-1], scale.shape[-1]])
        nbits = meta_bits(shape[-1], values.shape[-1])
        return HQQTensor(values, scale, nbits, size, axis, shape, torch.float32, zero_point=zero)

    scales = nested(scale)
    return HQQTensor(scale=scales, zero_point=None if zero_point is None else nested(zero_point), **data)


def install_configs() -> None:
    """Add the modules that hold configs of ours to those in which ``config_from_dict`` looks up a class by its name."""
    modules = ("hqqtensor.config", "hqqtensor.integrations.vllm.torchao_checkpoint")
    patches.register("torchao.core.config", "ALLOWED_AO_MODULES", modules, "reading configs of hqqtensor", TORCHAO)


def install_classes() -> None:
    """Let torchao's safetensors code make HQQTensors out of what it reads, and take them to write."""
    module, reason = "torchao.prototype.safetensors.safetensors_utils", "saving and loading through torchao"
    classes: dict[str, Any] = {"HQQTensor": HQQTensor, "QuantizedScales": _rebuild}
    patches.register(module, "ALLOWED_CLASSES", classes, reason, TORCHAO)
    patches.register(module, "ALLOWED_TENSORS_SUBCLASSES", [*classes], reason, TORCHAO)


def install_flatten() -> None:
    """Let torchao's writer take HQQTensors with quantized scales, also where transformers has imported it."""
    module, reason = "torchao.prototype.safetensors.safetensors_support", "saving quantized scales through torchao"
    patches.wrap(module, "flatten_tensor_state_dict", _with_plain_scales, reason, TORCHAO, also=["transformers"])


def _with_plain_scales(flatten: Callable) -> Callable:
    def flatten_tensor_state_dict(tensors_dict: dict[str, Any]) -> Any:
        nested = {n: t for n, t in tensors_dict.items() if isinstance(t, HQQTensor) and t.nested}
        return flatten({**tensors_dict, **{name: QuantizedScales(t) for name, t in nested.items()}})

    return flatten_tensor_state_dict
