"""For ``convert --to vllm``: a checkpoint and a ``quantization_config`` that vLLM's torchao loader accepts.

vLLM creates a linear layer's weight with torchao's ``quantize_`` and the stored config, on memory that is not
initialised, then copies slices of the checkpoint's tensor subclasses into slices of it. So the config here creates a
packed weight of zeros in the right geometry and solves nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.quantization.transform_module import register_quantize_module_handler

from hqqtensor.config import HqqConfig
from hqqtensor.formats import get_format
from hqqtensor.packing import row_bytes
from hqqtensor.quantize import show_quantized
from hqqtensor.selection import embeddings_and_output
from hqqtensor.tensor import HQQTensor

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM's models of the Llama kind (Llama, Mistral, Qwen, Gemma, ...) join into one."""


@dataclasses.dataclass(frozen=True)
class HqqStoredConfig(AOBaseConfig):
    """The geometry of weights that a checkpoint holds packed; ValueError for settings that HqqConfig refuses.

    Groups along in_features, scales in ``scale_dtype``. torchao's ``quantize_`` puts an HQQTensor of this geometry
    with zero codes in a weight's place, whatever the weight's numbers; a loader then copies into it.
    """

    nbits: int
    group_size: int
    format: str = "int"
    scale_dtype: torch.dtype = torch.float16
    activation: str = "float"

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int):  # nothing is chosen here: the file has the groups
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}")
        HqqConfig(**dataclasses.asdict(self))


@register_quantize_module_handler(HqqStoredConfig)
def _create_zeros(module: nn.Module, config: HqqStoredConfig, *, parameter_name: str = "weight") -> nn.Module:
    old: Any = getattr(module, parameter_name)
    if old.ndim != 2:
        raise ValueError(
            f"{type(module).__name__}.{parameter_name}: a stored weight is a matrix, not {list(old.shape)}"
        )
    rows, columns = old.shape
    qdata = torch.zeros(rows, row_bytes(columns, config.nbits), dtype=torch.uint8, device=old.device)
    scale = torch.zeros(rows, -(-columns // config.group_size), dtype=config.scale_dtype, device=old.device)
    zero = torch.zeros_like(scale) if get_format(config.format).has_zero_point else None
    placeholder = HQQTensor(
        qdata, scale, config.nbits, config.group_size, 1, old.shape, old.dtype, config.format,
        activation=config.activation, zero_point=zero,
    )  # fmt: skip
    setattr(module, parameter_name, nn.Parameter(placeholder, requires_grad=False))
    show_quantized(module)
    return module


@dataclasses.dataclass(frozen=True)
class VllmCheckpoint:
    """State and ``quantization_config`` for vLLM, and the names of quantized weights that became dense for it."""

    state: dict[str, Tensor]
    quantization_config: dict[str, Any]
    made_dense: list[str]


def for_vllm(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> VllmCheckpoint:
    """Prepare ``state`` for vLLM's torchao loader; ``model`` (may be on the meta device) says what each weight is.

    vLLM quantizes linear layers alone: embeddings and the output layer become dense ``dtype``. ValueError naming
    the weight for what the loader cannot cut and join: axis 0, quantized scales, codebooks, ``act_pre_scale``,
    transposed and 3-D weights, and layers that it fuses (``FUSED``) with unequal settings.
    """
    ends = embeddings_and_output(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - ends
    configs: dict[str, HqqStoredConfig] = {}
    out: dict[str, Tensor] = {}
    dense: list[str] = []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if not isinstance(tensor, HQQTensor):
            out[name] = tensor
        elif module in ends:
            out[name] = tensor.dequantize(dtype)
            dense.append(name)
        elif module in linears and leaf == "weight":
            configs[module] = _stored_config(name, tensor)
            out[name] = tensor.to(dtype)
        else:
            raise ValueError(f"{name}: is no weight of a linear layer, and vLLM's torchao loader quantizes those alone")
    if not configs:
        raise ValueError("no linear layer is quantized")
    by_name = {**{name: configs.get(name) for name in linears}, **_fused(linears, configs)}
    skip = sorted(name for name, config in by_name.items() if config is None)
    config = {"quant_method": "torchao", "quant_type": {"default": _as_dict(by_name)}, "modules_to_not_convert": skip}
    return VllmCheckpoint(out, config, dense)


def _as_dict(by_name: Mapping[str, HqqStoredConfig | None]) -> dict[str, Any]:
    """One config if all are equal, else torchao's config of configs by module name."""
    from torchao.quantization import FqnToConfig

    quantized = {name: config for name, config in by_name.items() if config is not None}
    if len(set(quantized.values())) == 1:
        return config_to_dict(next(iter(quantized.values())))
    return config_to_dict(FqnToConfig(dict(sorted(quantized.items()))))


def _fused(linears: set[str], configs: Mapping[str, HqqStoredConfig]) -> dict[str, HqqStoredConfig | None]:
    """The config of each layer that vLLM joins; ValueError if its members have different ones."""
    out: dict[str, HqqStoredConfig | None] = {}
    for parent in sorted({name.rpartition(".")[0] for name in linears}):
        for fused, members in FUSED.items():
            present = [name for leaf in members if (name := f"{parent}.{leaf}" if parent else leaf) in linears]
            if len(present) < 2:
                continue
            first = configs.get(present[0])
            for other in present[1:]:
                if configs.get(other) != first:
                    raise ValueError(
                        f"{present[0]} and {other}: vLLM joins them, so both need the same settings, got {first} and "
                        f"{configs.get(other)}"
                    )
            out[f"{parent}.{fused}" if parent else fused] = first
    return out


def _stored_config(name: str, tensor: HQQTensor) -> HqqStoredConfig:
    reasons = {
        "a weight that is no matrix": tensor.ndim != 2,
        "a transposed weight": tensor.transposed,
        "axis 0, whose groups run across rows": tensor.axis != 1,
        "quantized scales or zero points (quantize with group_size=64, or another number)": tensor.nested,
        "a learned codebook": tensor.codebook is not None,
        "act_pre_scale": tensor.act_pre_scale is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name}: vLLM's torchao loader cannot take {reason}")
    return HqqStoredConfig(tensor.nbits, tensor.group_size, tensor.format, tensor.scale.dtype, tensor.activation)
