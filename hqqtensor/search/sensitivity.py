"""How much a model suffers when one layer is quantized with one setting; kept in a JSON file that can be used again."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.calibration.inputs import run
from hqqtensor.config import HqqConfig
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
    """Sizes and losses by layer and setting.

    method: "weights": squared error of the weight, relative, times the number of weights. "outputs": what quantizing
        the layer alone does to the model's outputs (mean KL of the logits in nats, or where there are none the relative
        squared error of the last hidden states), found at one setting for each solver and carried to the others by
        their squared errors: both grow with the square of a small change.
    layers: by module name {"key": what it was measured on, "bytes": [...], "loss": [...]}, in the order of
        ``candidates``; None where a setting does not fit the layer.
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
    candidates: tuple[dict[str, Any], ...] = CANDIDATES,
    file: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Measure each layer that ``quantize_(model, config)`` would take; the model is left as it was.

    config: what all candidates share (solver, skip_modules, ...). batches: None to look at weights only, else
        batches (mappings, tuples or tensors) whose outputs are compared: of text, or of ``random_tokens`` where there
        is none. Their outputs are kept in memory: a few thousand tokens serve.
    file: results are written there after each layer, and layers found there, measured on the same weights and
        settings, are not measured again.
    ValueError for candidates that fit no layer, outputs without logits, or a ``file`` that is damaged or of another
    model.
    """
    config = config or HqqConfig()
    if config.dynamic_config:
        raise ValueError("the search chooses the settings of all layers: leave dynamic_config out, use skip_modules")
    settings = [HqqConfig.from_dict({**_shared(config), **c}) for c in candidates]
    method = "weights" if batches is None else "outputs"
    found = Sensitivity(method, [dict(c) for c in candidates])
    path = None if file is None else Path(file)
    old = Sensitivity.load(path) if path is not None and path.exists() else None
    if old is not None:
        old.check_model(model, path)  # type: ignore[arg-type]
        if old.candidates != found.candidates:  # measured with others: nothing of it can be used
            old = None
    before = None if batches is None else _outputs(model, batches)
    text = "" if before is None else _fingerprint(before[0])
    weights = selected_weights(model, config)
    for done, (name, weight) in enumerate(weights.items(), 1):
        key = _key(weight, settings, text)
        known = old.layers.get(name) if old is not None else None
        if known is None or known.get("key") != key:
            known = {"key": key, **_measure(model, name, weight, settings, batches, before)}
        found.layers[name] = known
        if path is not None:
            # What is still to come may lie in the old file: keep it for the next run.
            rest = {n: v for n, v in (old.layers if old else {}).items() if n not in found.layers}
            Sensitivity(method, found.candidates, {**found.layers, **rest}).save(path)
        if progress is not None:
            progress(done, len(weights), name)
    if path is not None:
        found.save(path)
    return found


def random_tokens(vocabulary: int, length: int = 256, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """One batch of ``input_ids`` ``[count, length]``, uniformly random below ``vocabulary``: no text is needed."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, vocabulary, (count, length), generator=generator)}]


def _shared(config: HqqConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "dynamic_config"}


def _measure(
    model: nn.Module, name: str, weight: nn.Parameter, settings: list[HqqConfig], batches: list[Any] | None,
    before: tuple[list[Tensor], bool] | None,
) -> dict[str, Any]:  # fmt: skip
    sizes: list[int | None] = []
    losses: list[float | None] = []
    w = weight.detach().to(torch.float32)
    total = float(w.square().sum())
    probes: dict[str, tuple[float, HQQTensor]] = {}
    for config in settings:
        if config.group_size is not None and config.group_size > weight.shape[-1 if config.axis == 1 else -2]:
            sizes.append(None)
            losses.append(None)
            continue
        q = HQQTensor.from_hp(weight.detach(), config)
        error = float((q.dequantize(torch.float32) - w).square().sum()) / total if total else 0.0
        sizes.append(q.nbytes)
        losses.append(error * weight.numel())
        # 3 bits: far enough from the dense weight to show, not so far that all is lost.
        probe = probes.get(config.solver)
        if error and (probe is None or abs(config.nbits - 3) < abs(probe[1].nbits - 3)):
            probes[config.solver] = error * weight.numel(), q
    if not any(size is not None for size in sizes):
        raise ValueError(f"{name}: none of the candidates' group sizes fits a weight of shape {list(weight.shape)}")
    if batches is not None and before is not None:
        module = model.get_submodule(name)
        factor = dict.fromkeys({config.solver for config in settings}, 0.0)
        for solver, (error, q) in probes.items():
            module._parameters["weight"] = nn.Parameter(q, requires_grad=False)
            try:
                factor[solver] = _change(before, _outputs(model, batches)) / error
            finally:
                module._parameters["weight"] = weight
        losses = [
            None if loss is None else loss * factor[config.solver]
            for loss, config in zip(losses, settings, strict=True)
        ]
    return {"bytes": sizes, "loss": losses}


@torch.no_grad()
def _outputs(model: nn.Module, batches: list[Any]) -> tuple[list[Tensor], bool]:
    """For each batch log probabilities ``[..., classes]`` and True, or the last hidden states and False; float32."""
    training, found, has_logits = model.training, [], False
    model.eval()
    try:
        for batch in batches:
            out = run(model, batch)
            has_logits = hasattr(out, "logits")
            result = out.logits if has_logits else getattr(out, "last_hidden_state", out)
            if not isinstance(result, Tensor):
                raise ValueError(f"{type(model).__name__} gives no logits or hidden states: measure without batches")
            result = result.detach().to(torch.float32)
            found.append(result.log_softmax(-1) if has_logits else result)
    finally:
        model.train(training)
    return found, has_logits


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


def _key(weight: Tensor, settings: list[HqqConfig], text: str) -> str:
    """What a measurement depends on: the weight, the settings, the outputs compared."""
    w = weight.detach()
    parts = [list(w.shape), str(w.dtype), float(w.double().sum()), float(w.double().square().sum())]
    own = [*parts, text, [c.to_dict() for c in settings]]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()
