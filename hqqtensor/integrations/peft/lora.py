"""LoRA layers over quantized weights. Merging dequantizes, adds and quantizes again; unmerging is exact."""

from collections.abc import Callable
from typing import Any

from peft.tuners.lora import layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import PEFT
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.settings import config_of


def quantize_like(dense: Tensor, old: HQQTensor) -> HQQTensor:
    """``dense`` quantized with the settings that ``old`` shows and the default solver; shape and dtype of ``old``."""
    weight = dense.transpose(-1, -2) if old.transposed else dense
    new = HQQTensor.from_hp(weight, config_of(old), old.row_dims)
    return new.transpose(-1, -2) if old.transposed else new  # type: ignore[return-value]


class _QuantizedBase:
    """Lets a LoRA layer merge into a dense copy of its base weight, which is then quantized again."""

    _weight_before_merging: tuple[nn.Parameter, ...] = ()
    """None or one; in a tuple, as it would else become a parameter of this layer, to be saved and moved with it."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters; ``unmerge`` puts back the weight from before the first merge. On an error nothing changes."""
        base = self.get_base_layer()
        quantized = base.weight
        count = len(self.merged_adapters)
        base.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            merged = quantized
            if len(self.merged_adapters) > count:
                merged = nn.Parameter(quantize_like(base.weight.detach(), quantized), requires_grad=False)
        except BaseException:
            base.weight = quantized
            raise
        base.weight = merged
        if merged is not quantized:
            self._weight_before_merging = self._weight_before_merging or (quantized,)

    def unmerge(self: Any) -> None:
        """Put back the weight from before the merge, bit for bit; peft undoes the bias and its records."""
        base = self.get_base_layer()
        before = self._weight_before_merging or (base.weight,)
        # peft subtracts the update from this dense copy, which is then dropped.
        base.weight = nn.Parameter(base.weight.dequantize(), requires_grad=False)
        super().unmerge()  # type: ignore[misc]
        (base.weight,) = before
        self._weight_before_merging = ()


class HqqLoraLinear(_QuantizedBase, layer.Linear):
    """LoRA over a quantized ``nn.Linear`` or ``Conv1D``."""


class HqqLoraEmbedding(_QuantizedBase, layer.Embedding):
    """LoRA over a quantized ``nn.Embedding``."""


class _QuantizedConvolution(_QuantizedBase):
    """peft's DoRA for convolutions computes with ``base_layer.weight`` itself."""

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> Any:
        """NotImplementedError for DoRA; the other variants are peft's to choose."""
        if getattr(config, "use_dora", False):
            raise NotImplementedError("use_dora: not offered for quantized convolutions; use LoRA, or leave them dense")
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]


class HqqLoraConv1d(_QuantizedConvolution, layer.Conv1d):
    """LoRA over a quantized ``nn.Conv1d``."""


class HqqLoraConv2d(_QuantizedConvolution, layer.Conv2d):
    """LoRA over a quantized ``nn.Conv2d``."""


class HqqLoraConv3d(_QuantizedConvolution, layer.Conv3d):
    """LoRA over a quantized ``nn.Conv3d``."""


_LORA_LAYERS: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Embedding, HqqLoraEmbedding),
    (nn.Conv1d, HqqLoraConv1d),
    (nn.Conv2d, HqqLoraConv2d),
    (nn.Conv3d, HqqLoraConv3d),
)
"""The layer for each kind of module; every other kind is linear."""


def install() -> None:
    """Put our layers before the one that peft takes for all torchao tensors."""
    patches.wrap("peft.tuners.lora.model", "dispatch_torchao", _dispatcher, "LoRA over quantized weights", PEFT)


def _dispatcher(dispatch_torchao: Callable) -> Callable:
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        name = kwargs.pop("parameter_name", None)
        if name is not None and isinstance(getattr(base, name, None), HQQTensor):
            raise NotImplementedError(
                f"target_parameters: {name} is quantized, and peft would add to it what it cannot hold; leave it dense "
                "with skip_modules, or target linear layers"
            )
        if not isinstance(getattr(base, "weight", None), HQQTensor):
            return dispatch_torchao(target, adapter_name, config=config, parameter_name=name, **kwargs)
        patches.require("peft.")
        kwargs.pop("get_apply_tensor_subclass", None)
        for kind, lora in _LORA_LAYERS:
            if isinstance(base, kind):
                return lora(target, adapter_name, config=config, **kwargs)
        is_conv1d = isinstance(base, Conv1D)
        config.fan_in_fan_out = is_conv1d
        return HqqLoraLinear(target, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)

    return dispatch
