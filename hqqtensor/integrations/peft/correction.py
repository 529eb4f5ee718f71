"""Adapters that begin by undoing part of the quantization error, from the weights alone (the idea of LoftQ)."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.integrations.peft import lora
from hqqtensor.streaming import Source
from hqqtensor.streaming.targets import find_targets
from hqqtensor.tensor import HQQTensor

_OVERSAMPLING = 16
"""Further directions that the randomized SVD follows, which bring it nearer to an exact one."""


@torch.no_grad()
def initialize(model: nn.Module, dense: nn.Module | str | Path, adapter_name: str) -> dict[str, float]:
    """See ``hqqtensor.integrations.peft.initialize_lora_from_error``."""
    layers = _layers(model, adapter_name)
    left, factors = {}, []
    with _dense_weights(model, dense) as read:
        for name, layer in layers.items():
            quantized = getattr(layer.get_base_layer(), layer.parameter_name)
            original = read(name)
            if original is None or isinstance(original, HQQTensor) or original.shape != quantized.shape:
                what = "missing" if original is None else f"{type(original).__name__} {list(original.shape)}"
                raise ValueError(f"dense: {name} must be a dense weight {list(quantized.shape)}, it is {what}")
            error = _oriented(layer, original.to(quantized.device, torch.float32) - quantized.dequantize().float())
            lhs, rhs = _low_rank(error, layer.r[adapter_name])
            left[name] = float((error - lhs @ rhs).square().sum() / error.square().sum().clamp_min(1e-30))
            factors.append((lhs, rhs))
    for layer, (lhs, rhs) in zip(layers.values(), factors, strict=True):
        root = layer.scaling[adapter_name] ** 0.5
        _assign(layer, adapter_name, lhs / root, rhs / root)
    return left


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The layers over quantized weights that have the adapter, by the name of the weight in the dense model."""
    layers: dict[str, Any] = {}
    for name, module in _base_model(model).named_modules():
        layer: Any = module
        if isinstance(module, lora.QuantizedBase) and adapter in layer.r:
            path = [part for part in name.split(".") if part != "base_layer"]
            if isinstance(module, lora.QuantizedConvolution):
                raise NotImplementedError(f"{name}: adapters of convolutions cannot be initialized from the error")
            if layer.merged:
                raise ValueError(f"{name}: its adapters are merged; call unmerge_adapter() first")
            layers[".".join([*path, layer.parameter_name])] = layer
    if not layers:
        raise ValueError(f"model: no quantized weight has a LoRA adapter named {adapter!r}")
    return layers


@contextlib.contextmanager
def _dense_weights(model: nn.Module, dense: nn.Module | str | Path) -> Iterator[Callable[[str], Tensor | None]]:
    """What gives a dense weight by its name in the model, None where there is none."""
    if isinstance(dense, nn.Module):
        yield dict(dense.named_parameters(remove_duplicate=False)).get
        return
    base = _base_model(model)
    with torch.device("meta"):
        empty = type(base)(base.config)
    empty.tie_weights()
    source = Source(Path(dense))
    try:
        targets = find_targets(empty, source)
        names = {id(value): name for name, value in empty.state_dict(keep_vars=True).items() if name in targets}
        known = {n: targets[names[id(v)]] for n, v in empty.state_dict(keep_vars=True).items() if id(v) in names}
        yield lambda name: known[name].read(source) if name in known else None
    finally:
        source.close()


def _oriented(layer: Any, error: Tensor) -> Tensor:
    """The error as ``[..., outputs, inputs]`` of the product that the adapter's two matrices are for."""
    if error.ndim == 3:
        return error if layer.is_swapped else error.mT
    return error.mT if layer.fan_in_fan_out or isinstance(layer, lora.HqqLoraEmbedding) else error


def _low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[..., N, rank]`` and ``[..., rank, K]``: their product is nearest to ``error`` in the sum of squares."""
    directions = min(rank + _OVERSAMPLING, *error.shape[-2:])
    with torch.random.fork_rng([error.device] if error.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(error, directions, niter=4)
    root, missing = s[..., None, :rank].sqrt(), max(0, rank - directions)
    lhs, rhs = (nn.functional.pad(side[..., :rank] * root, (0, missing)) for side in (u, v))
    return lhs, rhs.mT


def _assign(layer: Any, adapter: str, lhs: Tensor, rhs: Tensor) -> None:
    if isinstance(layer, lora.HqqLoraEmbedding):
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if lhs.ndim == 3:  # peft's order: experts and ranks as rows of A, ranks and experts as columns of B
        lhs, rhs = lhs.permute(1, 2, 0).flatten(1), rhs.flatten(0, 1)
    a.copy_(rhs)
    b.copy_(lhs)
    if layer.use_dora.get(adapter):
        layer.lora_variant[adapter].init(layer, adapter)
