"""Adapters that begin by undoing part of the quantization error.

From the weights alone as in LoftQ (Li et al. 2023, arXiv 2310.08659), or weighed by what the layers see as in CLoQ
(Deng et al. 2025, arXiv 2501.18475).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.integrations.peft import lora
from hqqtensor.integrations.peft.low_rank import Correction, correct
from hqqtensor.integrations.peft.seen_inputs import moments_in_turn
from hqqtensor.parameters import places_by_id
from hqqtensor.streaming import Source
from hqqtensor.streaming.targets import find_targets
from hqqtensor.tensor import HQQTensor


@torch.no_grad()
def initialize(
    model: nn.Module, dense: nn.Module | str | Path, adapter_name: str, batches: Iterable[Any] | None, rounds: int
) -> dict[str, float]:
    """See ``hqqtensor.integrations.peft.initialize_lora_from_error``."""
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}")
    layers = _layers(model, adapter_name)
    places = places_by_id(_base_model(model))
    corrections: dict[str, Correction] = {}
    with _dense_weights(model, dense) as read, _without_adapters(model, batches is not None):
        for name, second in moments_in_turn(_base_model(model), layers, batches):
            layer = layers[name]
            quantized = getattr(layer.get_base_layer(), layer.parameter_name)
            original = read(name)
            if original is None or isinstance(original, HQQTensor) or original.shape != quantized.shape:
                what = "missing" if original is None else f"{type(original).__name__} {list(original.shape)}"
                raise ValueError(f"dense: {name} must be a dense weight {list(quantized.shape)}, it is {what}")
            # Two adapters over one weight would each ask for other codes.
            again = rounds if len(places[id(quantized)]) == 1 else 0
            original = original.to(quantized.device, torch.float32)
            orient = _transposed if _is_transposed(layer, original) else _as_it_is
            corrections[name] = correct(original, quantized, orient, layer.r[adapter_name], second, again)
    for name, correction in corrections.items():
        layer, root = layers[name], layers[name].scaling[adapter_name] ** 0.5
        if correction.quantized is not None:
            setattr(layer.get_base_layer(), layer.parameter_name, nn.Parameter(correction.quantized, False))
        _assign(layer, adapter_name, correction.lhs / root, correction.rhs / root)
    return {name: corrections[name].left for name in layers}


@contextlib.contextmanager
def _without_adapters(model: Any, run: bool) -> Iterator[None]:
    """Where the model is to ``run``, layers see what the quantized model alone gives them."""
    if not run or not hasattr(model, "disable_adapter"):  # a fresh adapter changes nothing anyway
        yield
        return
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        yield
    for name, p in model.named_parameters():  # peft freezes adapters meanwhile, and thaws those of the active one
        p.requires_grad_(trained[name])


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


def _is_transposed(layer: Any, weight: Tensor) -> bool:
    """Whether the weight is ``[..., inputs, outputs]`` of the product that the adapter's two matrices are for."""
    if weight.ndim == 3:
        return not layer.is_swapped
    return bool(layer.fan_in_fan_out) or isinstance(layer, lora.HqqLoraEmbedding)


def _transposed(t: Tensor) -> Tensor:
    return t.mT


def _as_it_is(t: Tensor) -> Tensor:
    return t


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
