"""torchao's safetensors code, and so transformers' ``TorchAoConfig``, saves and loads HQQTensors.

Its files hold plain tensors under names of a fixed list, a tensor a name. A weight whose scales (or zero points) are
quantized themselves has more: it is saved as a ``QuantizedScales``, its own floats stacked in ``per_tensor_scale``.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from hqqtensor.encode import META_GROUP
from hqqtensor.import_hook import when_imported
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
            if isinstance(part, HQQTensor) and (part.axis, part.group_size) != _meta(part.shape):
                raise ValueError(f"torchao's files cannot hold {part!r} as the scale of {tensor!r}")
        self.qdata = tensor.qdata
        _, self.scale, self.zero_point = tensor.packed()
        self.per_tensor_scale = torch.stack(tensor.settings()[0])


def _meta(shape: torch.Size) -> tuple[int, int]:
    """Axis and group size of scales of this shape under ``quant_scale`` and ``quant_zero``."""
    return 0, min(META_GROUP, shape[-2])


def _rebuild(scale: Tensor, per_tensor_scale: Tensor, zero_point: Tensor | None = None, **data: Any) -> HQQTensor:
    """The HQQTensor that ``QuantizedScales`` stood for."""
    floats = list(per_tensor_scale)

    def nested(values: Tensor) -> Tensor:
        if values.dtype != torch.uint8:
            return values
        axis, size = _meta(values.shape)
        scale, zero = floats.pop(0), floats.pop(0)
        shape = torch.Size([*values.shape[:-1], scale.shape[-1]])
        nbits = meta_bits(shape[-1], values.shape[-1])
        return HQQTensor(values, scale, nbits, size, axis, shape, torch.float32, zero_point=zero)

    whole = nested(scale)
    return HQQTensor(scale=whole, zero_point=None if zero_point is None else nested(zero_point), **data)


def register_when_imported() -> None:
    """Register as soon as torchao's safetensors code is imported."""
    when_imported("torchao.prototype.safetensors.safetensors_utils", _install)
    when_imported("torchao.prototype.safetensors.safetensors_support", _install_flatten)


def _install() -> None:
    from torchao.prototype.safetensors import safetensors_utils

    kinds: dict[str, Any] = {"HQQTensor": HQQTensor, "QuantizedScales": _rebuild}
    safetensors_utils.ALLOWED_CLASSES.update(kinds)
    names = safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    names += [name for name in kinds if name not in names]


def _install_flatten() -> None:
    """Wrap torchao's function in its module and where transformers has it from there; once."""
    from torchao.prototype.safetensors import safetensors_support

    original = safetensors_support.flatten_tensor_state_dict
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def flatten_tensor_state_dict(tensors_dict: dict[str, Any]) -> Any:
        nested = {n: t for n, t in tensors_dict.items() if isinstance(t, HQQTensor) and t.nested}
        return original({**tensors_dict, **{name: QuantizedScales(t) for name, t in nested.items()}})

    for name, module in list(sys.modules.items()):
        theirs = name.partition(".")[0] in ("torchao", "transformers")
        if theirs and vars(module).get("flatten_tensor_state_dict") is original:
            module.flatten_tensor_state_dict = flatten_tensor_state_dict  # type: ignore[attr-defined]
