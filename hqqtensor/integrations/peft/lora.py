"""LoRA layers over quantized weights. Merging dequantizes, adds and quantizes again; unmerging is exact."""

import functools
from typing import Any

import torch
from peft.tuners.lora import layer, model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hqqtensor.config import HqqConfig
from hqqtensor.tensor import HQQTensor


def quantize_like(dense: Tensor, old: HQQTensor) -> HQQTensor:
    """``dense`` quantized with the settings that ``old`` shows and the default solver; shape and dtype of ``old``."""
    scale, zero = old.scale, old.zero_point
    widths = [t.nbits for t in (scale, zero) if isinstance(t, HQQTensor)]
    plain = [t.dtype for t in (scale, zero) if t is not None and not isinstance(t, HQQTensor)]
    whole = old.format == "int" and type(zero) is Tensor and torch.equal(zero, zero.round())
    config = HqqConfig(
        nbits=old.nbits,
        group_size=old.group_size,
        axis=old.axis,
        format=old.format,
        scale_dtype=plain[0] if plain else None,
        quant_scale=isinstance(scale, HQQTensor),
        quant_zero=isinstance(zero, HQQTensor),
        meta_nbits=min(widths, default=8),
        compute_dtype=old.dtype,
        activation=old.activation,
        codebook=old.codebook or "tensor",
        integer_zero=whole,
        view_as_float=old.qdata.dtype != torch.uint8,
        rotation=old.rotation > 0,
    )
    new = HQQTensor.from_hp(dense.transpose(-1, -2) if old.transposed else dense, config, old.row_dims)
    return new.transpose(-1, -2) if old.transposed else new  # type: ignore[return-value]


class _Quantized:
    """Lets a LoRA layer merge into a dense copy of its base weight, which is then quantized again."""

    _before: tuple[HQQTensor, ...] = ()

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters; the weight before the first merge is kept for ``unmerge``."""
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
            self._before = self._before or (quantized,)

    def unmerge(self: Any) -> None:
        """Put back the weight from before the merge, bit for bit; peft's own undoes the bias and its records."""
        base = self.get_base_layer()
        base.weight = nn.Parameter(base.weight.dequantize(), requires_grad=False)
        super().unmerge()  # type: ignore[misc]
        (base.weight,) = self._before or (base.weight,)
        self._before = ()


class HqqLoraLinear(_Quantized, layer.Linear):
    """LoRA over a quantized ``nn.Linear`` or ``Conv1D``."""


class HqqLoraEmbedding(_Quantized, layer.Embedding):
    """LoRA over a quantized ``nn.Embedding``."""


class _QuantizedConvolution(_Quantized):
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


_OWN_KIND: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Embedding, HqqLoraEmbedding),
    (nn.Conv1d, HqqLoraConv1d),
    (nn.Conv2d, HqqLoraConv2d),
    (nn.Conv3d, HqqLoraConv3d),
)


def _install() -> None:
    """Put our layers before the one that peft takes for all torchao tensors; once."""
    original = model.dispatch_torchao
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def dispatch(target: torch.nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        name = kwargs.pop("parameter_name", None)
        if name is not None and isinstance(getattr(base, name, None), HQQTensor):
            raise NotImplementedError(
                f"target_parameters: {name} is quantized, and peft would add to it what it cannot hold; leave it dense "
                "with skip_modules, or target linear layers"
            )
        if isinstance(getattr(base, "weight", None), HQQTensor):
            kwargs.pop("get_apply_tensor_subclass", None)
            for kind, lora in _OWN_KIND:
                if isinstance(base, kind):
                    return lora(target, adapter_name, config=config, **kwargs)
            config.fan_in_fan_out = isinstance(base, Conv1D)
            return HqqLoraLinear(
                target, adapter_name, config=config, is_target_conv_1d_layer=isinstance(base, Conv1D), **kwargs
            )
        return original(target, adapter_name, config=config, parameter_name=name, **kwargs)

    model.dispatch_torchao = dispatch


_install()
