"""One layer's sizes and losses by candidate: errors of the weight, and what they do to the model's outputs."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.calibration.build import from_calibrated
from hqqtensor.calibration.moments import InputMoments
from hqqtensor.config import HqqConfig
from hqqtensor.forward import comparable_output, evaluating
from hqqtensor.half_products import fast_half_products
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.parameters import replace_parameters
from hqqtensor.search.layers import Layer
from hqqtensor.tensor import HQQTensor


class Outputs:
    """The outputs of a dense model on batches, to compare with. ``seconds``: how long they took.

    offloaded: the model where its blocks lie on disk.

    ValueError for outputs that are not finite, or neither logits nor hidden states.
    """

    def __init__(self, model: nn.Module, batches: list[Any], offloaded: OffloadedBlocks | None = None) -> None:
        self.model, self.batches, self.offloaded = model, batches, offloaded
        started = time.monotonic()
        self.dense, self.has_logits = self._run()
        self.seconds = time.monotonic() - started
        sums = [(list(o.shape), float(o.double().sum())) for o in self.dense]
        self.fingerprint = hashlib.sha256(repr(sums).encode()).hexdigest()

    def change(self, weight: nn.Parameter, quantized: HQQTensor) -> float:
        """Mean KL of log probabilities, or the relative squared error of anything else.

        Of the model with ``quantized`` wherever it uses ``weight``; the model is left as it was.
        """
        with self._replaced(weight, nn.Parameter(quantized, requires_grad=False)):
            outputs, _ = self._run()
        pairs = list(zip(self.dense, outputs, strict=True))
        if self.has_logits:
            total = sum(F.kl_div(q, p, reduction="sum", log_target=True).item() for p, q in pairs)
            return max(0.0, total / sum(p[..., 0].numel() for p, _ in pairs))
        size = sum(p.square().sum().item() for p, _ in pairs)
        return sum((p - q).square().sum().item() for p, q in pairs) / max(size, 1e-30)

    @contextlib.contextmanager
    def _replaced(self, weight: nn.Parameter, other: nn.Parameter) -> Iterator[None]:
        if self.offloaded is not None and weight.is_meta:
            with self.offloaded.replaced(weight, other):
                yield
            return
        try:
            replace_parameters(self.model, {id(weight): other})
            yield
        finally:
            replace_parameters(self.model, {id(other): weight})

    @torch.no_grad()
    def _run(self) -> tuple[list[Tensor], bool]:
        """For each batch log probabilities ``[..., classes]`` and True, or the last hidden states and False."""
        outputs: list[Tensor] = []
        has_logits = False
        with evaluating(self.model), fast_half_products():
            for batch in self.batches:
                result, has_logits = comparable_output(self.model, batch)
                if not bool(result.isfinite().all()):
                    raise ValueError(f"{type(self.model).__name__}: its outputs are not finite on these batches")
                outputs.append(result.log_softmax(-1) if has_logits else result)
        return outputs, has_logits


@dataclass(frozen=True)
class _Probe:
    """The setting with which a solver's effect on the outputs is measured. error: as the losses by weights."""

    nbits: int
    quantized: HQQTensor
    error: float


def measure_layer(
    layer: Layer, dense: nn.Parameter, outputs: Outputs | None, importance: Tensor | None
) -> dict[str, Any]:
    """The "bytes" and "loss" of a layer, see ``Sensitivity``.

    dense: the layer's weight with its values. importance: float32 ``[K]``, mean square of each input where the layer
    will be calibrated.
    """
    sizes: list[int | None] = [None] * len(layer.configs)
    losses: list[float | None] = [None] * len(layer.configs)
    w = dense.detach().to(torch.float32)
    total = _squares(w, importance)
    probes: dict[str, _Probe] = {}
    for i, config in enumerate(layer.configs):
        if config is None:
            continue
        quantized = _quantized(dense, config, importance)
        relative = _squares(quantized.dequantize(torch.float32) - w, importance) / total if total else 0.0
        error = relative * w.numel()
        sizes[i], losses[i] = quantized.nbytes, error
        # 3 bits: far enough from the dense weight to show, not so far that all is lost.
        probe = probes.get(config.solver)
        if error and (probe is None or abs(config.nbits - 3) < abs(probe.nbits - 3)):
            probes[config.solver] = _Probe(config.nbits, quantized, error)
    if outputs is not None:
        change_by_error = {s: outputs.change(layer.weight, p.quantized) / p.error for s, p in probes.items()}
        losses = [
            None if loss is None or config is None else loss * change_by_error.get(config.solver, 0.0)
            for loss, config in zip(losses, layer.configs, strict=True)
        ]
    return {"bytes": sizes, "loss": losses}


def _quantized(weight: nn.Parameter, config: HqqConfig, importance: Tensor | None) -> HQQTensor:
    if importance is None:
        return HQQTensor.from_hp(weight.detach(), config)
    return from_calibrated(weight.detach(), config, InputMoments(importance))[0]


def _squares(w: Tensor, importance: Tensor | None) -> float:
    """Sum of the squares of ``w [N, K]``, each column times its importance."""
    columns = w.square().sum(0)
    return float(columns.sum() if importance is None else columns @ importance)


def key_of(layer: Layer, dense: nn.Parameter, outputs: Outputs | None, importance: Tensor | None) -> str:
    """What a measurement depends on: the weight, the settings, the outputs compared, the calibration."""
    w = dense.detach()
    weight_key = [list(w.shape), str(w.dtype), float(w.double().sum()), float(w.double().square().sum())]
    configs = [None if config is None else config.to_dict() for config in layer.configs]
    everything = [*weight_key, "" if outputs is None else outputs.fingerprint, configs]
    if importance is not None:
        everything += [float(importance.double().sum()), float(importance.double().square().sum())]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()
