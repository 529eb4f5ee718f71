"""How much a model suffers when one layer is quantized with one setting; kept in a JSON file that can be used again."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.config import HqqConfig
from hqqtensor.forward import comparable_output, evaluating
from hqqtensor.parameters import replace_parameters
from hqqtensor.search.stored import VERSION, read_sensitivities
from hqqtensor.selection import selected_weights
from hqqtensor.tensor import HQQTensor

_META = {"quant_scale": True, "quant_zero": True}
CANDIDATES: tuple[dict[str, Any], ...] = (
    *({"nbits": b, "group_size": g, **_META, "meta_nbits": 4} for b in (2, 3, 4) for g in (16, 32, 64, 128)),
    *({"nbits": b, "group_size": 64, **_META, "meta_nbits": 8} for b in (2, 3, 4, 5, 6, 8)),
)
"""Settings tried for each layer in the default search: 2 to 8 bits, groups of 16 to 128.

Up to 4 bits 4-bit metadata gives less error for the same bits a weight; 8-bit metadata is for layers whose rows differ
much in size, and for codes of more than 4 bits.
"""

LEARNED: tuple[dict[str, Any], ...] = tuple(
    {"nbits": b, "group_size": g, "format": "codebook", "quant_scale": True, "quant_zero": False, "meta_nbits": 4}
    for b, g in ((2, 8), (2, 16), (2, 32), (3, 32), (3, 64))
)
"""More candidates, learned entries with 4-bit scales: less error than integers up to 3.2 bits, and slow to find."""


@dataclass
class Sensitivity:
    """Sizes and losses by layer and candidate.

    method: "weights": squared error of the weight, relative, times the number of weights. "outputs": what quantizing
        the layer alone does to the model's outputs (mean KL of the logits in nats, or where there are none the relative
        squared error of the last hidden states). It is measured with one setting for each solver. The others get it in
        proportion to their squared errors: both grow with the square of a small change.
    candidates: settings of ``HqqConfig``.
    layers: by module name {"key": hash of what was measured, "bytes": [...], "loss": [...]}, one entry for each of
        ``candidates``; None where a candidate's groups are longer than the layer.
    """

    method: str
    candidates: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        work = path.with_name(path.name + ".part")
        work.write_text(json.dumps({"version": VERSION, **self.__dict__}, indent=1) + "\n", encoding="utf-8")
        os.replace(work, path)

    @staticmethod
    def load(path: Path) -> "Sensitivity":
        """Read ``save``'s file; ValueError naming the file and the entry that is wrong."""
        return Sensitivity(**read_sensitivities(Path(path)))

    def check_model(self, model: nn.Module, path: Path | str) -> None:
        """ValueError where the file ``path``, from which this was loaded, has layers that ``model`` has not."""
        modules = dict(model.named_modules())
        strangers = [name for name in self.layers if getattr(modules.get(name), "weight", None) is None]
        if strangers:
            raise ValueError(
                f"{path} is of another model: {strangers[0]!r} ({len(strangers)} such) is no layer of this one; "
                "give another file"
            )


def measure_sensitivity(
    model: nn.Module,
    config: HqqConfig | None = None,
    batches: list[Any] | None = None,
    candidates: Sequence[dict[str, Any]] = CANDIDATES,
    file: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Measure each layer that ``quantize_(model, config)`` would take; the model is left as it was.

    config: what all candidates share (solver, skip_modules, ...); layers that its embedding_nbits serves are left out.
        batches: None to look at weights only, else
        batches (mappings, tuples or tensors) whose outputs are compared: of text, or of ``random_tokens`` where there
        is none. Their outputs are kept in memory: a few thousand tokens serve.
    file: results are written there after each layer, and layers already in it, measured on the same weights and
        settings, are not measured again.
    progress: called as ``progress(done, total, name)`` after each layer.
    ValueError for a layer that no candidate fits or a ``file`` that is damaged or of another model (both before any is
    measured), for outputs without logits, and for outputs that are not finite.
    """
    config = config or HqqConfig()
    if any(entry is not None for entry in (config.dynamic_config or {}).values()):
        raise ValueError(
            "the search chooses the settings of all layers: dynamic_config may only leave some dense (None), as "
            "skip_modules does"
        )
    configs = candidate_configs(config, candidates)
    weights = selected_weights(model, config)
    for name, weight in weights.items():
        check_fits(name, weight.shape, configs)
    path = None if file is None else Path(file)
    earlier = {} if path is None else _earlier_layers(path, model, candidates)
    method = "weights" if batches is None else "outputs"
    dense_outputs = None if batches is None else _outputs(model, batches)
    outputs_key = "" if dense_outputs is None else _fingerprint(dense_outputs[0])
    layers: dict[str, dict[str, Any]] = {}
    for done, (name, weight) in enumerate(weights.items(), 1):
        key = _key(weight, configs, outputs_key)
        layer = earlier.get(name)
        if layer is None or layer.get("key") != key:
            layer = {"key": key, **_measure(model, weight, configs, batches, dense_outputs)}
        layers[name] = layer
        if path is not None:
            # Layers still to come may be in the file from an earlier run: they stay in it for the next one.
            Sensitivity(method, [dict(c) for c in candidates], {**earlier, **layers}).save(path)
        if progress is not None:
            progress(done, len(weights), name)
    result = Sensitivity(method, [dict(c) for c in candidates], layers)
    if path is not None:
        result.save(path)
    return result


def _earlier_layers(path: Path, model: nn.Module, candidates: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers in the file ``path``; none where there is no file or it is of other candidates."""
    if not path.exists():
        return {}
    stored = Sensitivity.load(path)
    stored.check_model(model, path)
    return stored.layers if stored.candidates == [dict(candidate) for candidate in candidates] else {}


def random_tokens(vocabulary: int, length: int = 256, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """One batch of ``input_ids`` ``[count, length]``, uniformly random below ``vocabulary``: no text is needed."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, vocabulary, (count, length), generator=generator)}]


def candidate_configs(config: HqqConfig, candidates: Sequence[dict[str, Any]]) -> list[HqqConfig]:
    """``config`` with the settings of each candidate; ValueError for settings that HqqConfig refuses.

    A candidate is read as an entry of dynamic_config is: one with a group size has plain scales unless it, or what
    ``config`` was made of, says otherwise.
    """
    shared = {k: v for k, v in config.to_dict().items() if k not in ("dynamic_config", "embedding_nbits")}
    shared |= config.given_groups()
    return [HqqConfig.from_dict({**shared, **candidate}) for candidate in candidates]


def fits(shape: Sequence[int], config: HqqConfig) -> bool:
    """Whether a group of ``config`` is no longer than the side of a weight ``[N, K]`` that it runs along."""
    return config.group_size is None or config.group_size <= shape[-1 if config.axis == 1 else -2]


def check_fits(name: str, shape: Sequence[int], configs: Sequence[HqqConfig]) -> None:
    """ValueError naming the layer ``name`` where none of ``configs`` fits its weight ``[N, K]``."""
    if not any(fits(shape, config) for config in configs):
        raise ValueError(f"{name}: none of the candidates' group sizes fits a weight of shape {list(shape)}")


@dataclass(frozen=True)
class _Probe:
    """The setting with which a solver's effect on the outputs is measured. error: as the losses by weights."""

    nbits: int
    quantized: HQQTensor
    error: float


def _measure(
    model: nn.Module, weight: nn.Parameter, configs: list[HqqConfig], batches: list[Any] | None,
    dense_outputs: tuple[list[Tensor], bool] | None,
) -> dict[str, Any]:  # fmt: skip
    """The "bytes" and "loss" of a layer, see ``Sensitivity``."""
    sizes: list[int | None] = []
    losses: list[float | None] = []
    w = weight.detach().to(torch.float32)
    total = float(w.square().sum())
    probes: dict[str, _Probe] = {}
    for config in configs:
        if not fits(weight.shape, config):
            sizes.append(None)
            losses.append(None)
            continue
        quantized = HQQTensor.from_hp(weight.detach(), config)
        relative = float((quantized.dequantize(torch.float32) - w).square().sum()) / total if total else 0.0
        error = relative * weight.numel()
        sizes.append(quantized.nbytes)
        losses.append(error)
        # 3 bits: far enough from the dense weight to show, not so far that all is lost.
        probe = probes.get(config.solver)
        if error and (probe is None or abs(config.nbits - 3) < abs(probe.nbits - 3)):
            probes[config.solver] = _Probe(config.nbits, quantized, error)
    if batches is not None and dense_outputs is not None:
        change_by_error = dict.fromkeys({config.solver for config in configs}, 0.0)
        for solver, probe in probes.items():
            outputs = _outputs_with(model, weight, probe.quantized, batches)
            change_by_error[solver] = _change(dense_outputs, outputs) / probe.error
        losses = [
            None if loss is None else loss * change_by_error[config.solver]
            for loss, config in zip(losses, configs, strict=True)
        ]
    return {"bytes": sizes, "loss": losses}


def _outputs_with(
    model: nn.Module, weight: nn.Parameter, quantized: HQQTensor, batches: list[Any]
) -> tuple[list[Tensor], bool]:
    """Outputs of ``model`` with ``quantized`` wherever it uses ``weight``; the model is left as it was."""
    replacement = nn.Parameter(quantized, requires_grad=False)
    try:
        replace_parameters(model, {id(weight): replacement})
        return _outputs(model, batches)
    finally:
        replace_parameters(model, {id(replacement): weight})


@torch.no_grad()
def _outputs(model: nn.Module, batches: list[Any]) -> tuple[list[Tensor], bool]:
    """For each batch log probabilities ``[..., classes]`` and True, or the last hidden states and False; float32."""
    outputs: list[Tensor] = []
    has_logits = False
    with evaluating(model):
        for batch in batches:
            result, has_logits = comparable_output(model, batch)
            if not bool(result.isfinite().all()):
                raise ValueError(f"{type(model).__name__}: its outputs are not finite on these batches")
            outputs.append(result.log_softmax(-1) if has_logits else result)
    return outputs, has_logits


def _change(before: tuple[list[Tensor], bool], after: tuple[list[Tensor], bool]) -> float:
    """Mean KL of log probabilities, or the relative squared error of anything else."""
    pairs = list(zip(before[0], after[0], strict=True))
    if before[1]:
        total = sum(F.kl_div(q, p, reduction="sum", log_target=True).item() for p, q in pairs)
        return max(0.0, total / sum(p[..., 0].numel() for p, _ in pairs))
    size = sum(p.square().sum().item() for p, _ in pairs)
    return sum((p - q).square().sum().item() for p, q in pairs) / max(size, 1e-30)


def _fingerprint(outputs: list[Tensor]) -> str:
    return hashlib.sha256(repr([(list(o.shape), float(o.double().sum())) for o in outputs]).encode()).hexdigest()


def _key(weight: Tensor, configs: list[HqqConfig], outputs_key: str) -> str:
    """What a measurement depends on: the weight, the settings, the outputs compared."""
    w = weight.detach()
    weight_key = [list(w.shape), str(w.dtype), float(w.double().sum()), float(w.double().square().sum())]
    everything = [*weight_key, outputs_key, [c.to_dict() for c in configs]]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()
