"""LoRA layers over quantized weights. Merging dequantizes, adds and quantizes again; unmerging is exact."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hqqtensor.integrations import patches
from hqqtensor.integrations.peft.adapted_weight import AdaptedWeight
from hqqtensor.integrations.versions import PEFT
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.settings import config_of


def quantize_like(dense: Tensor, old: HQQTensor) -> HQQTensor:
    """``dense`` quantized with the settings that ``old`` shows and the default solver; shape and dtype of ``old``."""
    weight = dense.transpose(-1, -2) if old.transposed else dense
    new = HQQTensor.from_hp(weight, config_of(old), old.row_dims)
    return new.transpose(-1, -2) if old.transposed else new  # type: ignore[return-value]


class QuantizedBase:
    """Lets a LoRA layer merge into a dense copy of its base weight, which is then quantized again."""

    parameter_name = "weight"
    _weight_before_merging: tuple[nn.Parameter, ...] = ()
    """None or one; in a tuple, as it would else become a parameter of this layer, to be saved and moved with it."""

    def _set_weight(self: Any, weight: nn.Parameter) -> None:
        setattr(self.get_base_layer(), self.parameter_name, weight)

    def _set_dense(self: Any) -> nn.Parameter:
        """Put a dense copy in the quantized weight's place; the quantized one, which peft must not change."""
        quantized = getattr(self.get_base_layer(), self.parameter_name)
        self._set_weight(nn.Parameter(quantized.dequantize(), requires_grad=False))
        return quantized

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters; ``unmerge`` puts back the weight from before the first merge. On an error nothing changes."""
        count = len(self.merged_adapters)
        quantized = self._set_dense()
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            merged = quantized
            if len(self.merged_adapters) > count:
                dense = getattr(self.get_base_layer(), self.parameter_name).detach()
                merged = nn.Parameter(quantize_like(dense, quantized), requires_grad=False)
        except BaseException:
            self._set_weight(quantized)
            raise
        self._set_weight(merged)
        if merged is not quantized:
            self._weight_before_merging = self._weight_before_merging or (quantized,)

    def unmerge(self: Any) -> None:
        """Put back the weight from before the merge, bit for bit; peft undoes the bias and its records."""
        quantized = self._set_dense()  # peft subtracts the update from the dense copy, which is then dropped
        super().unmerge()  # type: ignore[misc]
        (before,) = self._weight_before_merging or (quantized,)
        self._set_weight(before)
        self._weight_before_merging = ()


class HqqLoraLinear(QuantizedBase, layer.Linear):
    """LoRA over a quantized ``nn.Linear`` or ``Conv1D``."""


class HqqLoraEmbedding(QuantizedBase, layer.Embedding):
    """LoRA over a quantized ``nn.Embedding``."""


class ParamWrapper(QuantizedBase, layer.ParamWrapper):
    """LoRA over a quantized parameter that ``target_parameters`` names, such as the weights of all experts.

    peft lets two parameters of a module be wrapped only where the class has this very name.
    """

    @property
    def is_swapped(self: Any) -> bool:
        """Whether a stack of experts is ``[E, outputs, inputs]``, not ``[E, inputs, outputs]``."""
        return self._did_swap_in_out_features

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """Let the module see the parameter with the updates; the parameter itself stays where it is."""
        factors = [self._low_rank(name) for name in active_adapters if name in self.lora_A]
        if not factors:
            yield
            return
        lhs, rhs = (torch.cat(parts, dim) for parts, dim in zip(zip(*factors, strict=True), (-1, -2), strict=True))
        base = self.get_base_layer()
        # An entry here is found before the parameter of the same name, which stays registered.
        base.__dict__[self.parameter_name] = AdaptedWeight(self.get_param(), lhs, rhs)
        try:
            yield
        finally:
            del base.__dict__[self.parameter_name]

    def _low_rank(self: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """lhs ``[..., N, r]`` and rhs ``[..., r, K]``, whose product is the update of the parameter ``[..., N, K]``."""
        if self.get_param().ndim == 2:
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return b * self.scaling[adapter], a
        lhs, rhs, scaling = self.get_delta_factors(adapter)
        return (lhs * scaling).contiguous(), rhs.contiguous()


class QuantizedConvolution(QuantizedBase):
    """peft's DoRA for convolutions computes with ``base_layer.weight`` itself."""

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> Any:
        """NotImplementedError for DoRA; the other variants are peft's to choose."""
        if getattr(config, "use_dora", False):
            raise NotImplementedError("use_dora: not offered for quantized convolutions; use LoRA, or leave them dense")
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]


class HqqLoraConv1d(QuantizedConvolution, layer.Conv1d):
    """LoRA over a quantized ``nn.Conv1d``."""


class HqqLoraConv2d(QuantizedConvolution, layer.Conv2d):
    """LoRA over a quantized ``nn.Conv2d``."""


class HqqLoraConv3d(QuantizedConvolution, layer.Conv3d):
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
    name, reason = "get_peft_model_state_dict", "saving adapters of quantized embeddings"
    patches.wrap("peft.utils.save_and_load", name, _without_quantized, reason, PEFT)
    importlib.import_module("peft.tuners.lora.dora")
    name, reason = "DoraLinearLayer.get_weight_norm", "DoRA over quantized embeddings"
    patches.wrap("peft.tuners.lora.dora", name, _norm_of_quantized, reason, PEFT)


def _dispatcher(dispatch_torchao: Callable) -> Callable:
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        name = kwargs.pop("parameter_name", None)
        if not isinstance(getattr(base, name or "weight", None), HQQTensor):
            return dispatch_torchao(target, adapter_name, config=config, parameter_name=name, **kwargs)
        patches.require("peft.")
        kwargs.pop("get_apply_tensor_subclass", None)
        if name is not None:
            return ParamWrapper(target, adapter_name, parameter_name=name, config=config, **kwargs)
        for kind, lora in _LORA_LAYERS:
            if isinstance(base, kind):
                return lora(target, adapter_name, config=config, **kwargs)
        is_conv1d = isinstance(base, Conv1D)
        config.fan_in_fan_out = is_conv1d
        return HqqLoraLinear(target, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)

    return dispatch


def _norm_of_quantized(get_weight_norm: Callable) -> Callable:
    """For embeddings peft hands over ``base_layer.weight`` itself."""

    def wrapper(self: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dense = weight.dequantize() if isinstance(weight, HQQTensor) else weight
        return get_weight_norm(self, dense, *args, **kwargs)

    return wrapper


def _without_quantized(get_peft_model_state_dict: Callable) -> Callable:
    """Beside adapters of embeddings peft saves the embedding itself; a quantized one is frozen and stays out."""

    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = get_peft_model_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not isinstance(value, HQQTensor)}

    return wrapper
