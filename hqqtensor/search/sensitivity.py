"""How much a model suffers when one layer is quantized with one setting; kept in a JSON file that can be used again."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hqqtensor.calibration import Calibration
from hqqtensor.calibration.build import check_calibrated
from hqqtensor.calibration.data import random_ids
from hqqtensor.config import HqqConfig
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.search.layers import CANDIDATES, Layer, base_of, layers_of, measuring_order
from hqqtensor.search.measure import Outputs, key_of, measure_layer
from hqqtensor.search.pace import Pace, estimate
from hqqtensor.search.stored import VERSION, read_sensitivities
from hqqtensor.whole_file import write_text_whole

MEASURED_TOKENS = 2048
"""About how many tokens of a calibration the outputs are compared on: a pass for each layer runs over them."""


@dataclass
class Sensitivity:
    """Sizes and losses by layer and candidate.

    method: "weights": squared error of the weight, relative, times the number of weights. "outputs": what quantizing
        the layer alone does to the model's outputs (mean KL of the logits in nats, or where there are none the relative
        squared error of the last hidden states). It is measured with one setting for each solver. The others get it in
        proportion to their squared errors: both grow with the square of a small change.
        With a calibration errors are weighed by the mean squares of the inputs.
    candidates: settings of ``HqqConfig``.
    layers: by module name {"key": hash of what was measured, "bytes": [...], "loss": [...]}, one entry for each of
        ``candidates``; None where a candidate is not for the layer, or its groups are longer. The key of a layer whose
        losses are estimated is empty.
    """

    method: str
    candidates: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def estimated(self) -> list[str]:
        """Names of the layers that ``time_limit`` left no time for.

        Their losses are those of measured layers of the same kind (such as down projections), by depth in the model.
        """
        return [name for name, layer in self.layers.items() if not layer["key"]]

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text_whole(path, json.dumps({"version": VERSION, **self.__dict__}, indent=1) + "\n")

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
    calibration: Calibration | None = None,
    time_limit: float | None = None,
    announce: Callable[[float, int], None] | None = None,
    offloaded: OffloadedBlocks | None = None,
) -> Sensitivity:
    """Measure each layer that ``quantize_(model, config)`` would take; the model is left as it was.

    config: what all candidates share (solver, skip_modules, ...). candidates: settings to try. The input embedding and
        the output layer are measured where ``EMBEDDINGS`` (or some of it) is among them, else left to embedding_nbits.
    batches: mappings, tuples or tensors whose outputs are compared: of text, or of ``random_tokens`` where there is
        none. Their outputs are kept in memory: a few thousand tokens serve. None looks at weights only, or takes
        batches of the ``calibration`` if there is one.
    calibration: that of the ``quantize_`` to come. Layers are then quantized and their errors weighed with the mean
        squares of their inputs.
    file: results are written there after each layer, and layers already in it, measured on the same weights and
        settings, are not measured again.
    progress: called as ``progress(done, total, name)`` after each layer. announce: called once, as
        ``announce(seconds, layers)``, when a layer has been timed: how long all the others would take.
    time_limit: seconds for measuring. The outputs of the dense model and one layer are measured in any case, others as
        long as they are expected to end in time. The rest is estimated, see ``Sensitivity.estimated``.
    offloaded: ``model`` where its blocks lie on disk: each is in memory while it runs or is measured.
    ValueError for a layer that no candidate fits, a candidate that the calibration does not serve, or a ``file`` that
    is damaged or of another model (all before any is measured), for outputs without logits, and for outputs that are
    not finite.
    """
    config = base_of(config)
    _check_arguments(config, time_limit)
    tried = [dict(candidate) for candidate in candidates]
    layers = layers_of(model, config, tried)
    if calibration is not None:
        _check_served(layers, calibration)
        batches = _some_batches(calibration) if batches is None else batches
    path = None if file is None else Path(file)
    earlier = {} if path is None else _earlier_layers(path, model, tried)
    pace = Pace(time_limit)
    outputs = None if batches is None else Outputs(model, batches, offloaded)
    method = "weights" if outputs is None else "outputs"
    measured: dict[str, dict[str, Any]] = {}
    for name, entry in _measurements(measuring_order(layers), earlier, outputs, calibration, pace, announce, offloaded):
        measured[name] = entry
        if path is not None:
            # Layers still to come may be in the file from an earlier run: they stay in it for the next one.
            Sensitivity(method, tried, {**earlier, **measured}).save(path)
        if progress is not None:
            progress(len(measured), len(layers), name)
    if path is not None:
        Sensitivity(method, tried, measured).save(path)
    all_layers = {x.name: measured.get(x.name) or estimate(x, layers, measured) for x in layers}
    return Sensitivity(method, tried, all_layers)


def _measurements(
    order: Sequence[Layer], earlier: dict[str, dict[str, Any]], outputs: Outputs | None,
    calibration: Calibration | None, pace: Pace, announce: Callable[[float, int], None] | None,
    offloaded: OffloadedBlocks | None,
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Name and entry of each layer: those of ``earlier`` that still hold, others measured as long as there is time."""
    pace.pass_seconds = 0.0 if outputs is None else outputs.seconds
    for place, layer in enumerate(order, 1):
        if layer.name not in earlier and not pace.allows(layer):
            continue
        importance = _importance(layer, calibration)
        dense = layer.weight if offloaded is None else offloaded.values(layer.weight)
        key = key_of(layer, dense, outputs, importance)
        if layer.name in earlier and earlier[layer.name]["key"] == key:
            yield layer.name, earlier[layer.name]
        elif pace.allows(layer):
            is_first, started = pace.weights == 0, time.monotonic()
            entry = {"key": key, **measure_layer(layer, dense, outputs, importance)}
            pace.add(layer, time.monotonic() - started)
            to_come = [other for other in order[place:] if other.name not in earlier]
            if is_first and to_come and announce is not None:
                announce(pace.expect(to_come), len(to_come))
            yield layer.name, entry


def _check_arguments(config: HqqConfig, time_limit: float | None) -> None:
    if any(entry is not None for entry in (config.dynamic_config or {}).values()):
        raise ValueError(
            "the search chooses the settings of all layers: dynamic_config may only leave some dense (None), as "
            "skip_modules does"
        )
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be over 0 seconds, got {time_limit}")


def _importance(layer: Layer, calibration: Calibration | None) -> Tensor | None:
    """Mean squares of the layer's inputs, float32 ``[K]``; None where the calibration has none or there is none."""
    moments = {} if calibration is None else calibration.moments
    return next((moments[name] for name in layer.modules if name in moments), None)


def _check_served(layers: Sequence[Layer], calibration: Calibration) -> None:
    """ValueError for settings that ``quantize_`` would refuse with this calibration, or that are not measured with one.

    And for a calibration of another model.
    """
    for layer in layers:
        importance = _importance(layer, calibration)
        if importance is None:
            continue
        if len(importance) != layer.weight.shape[1]:
            raise ValueError(
                f"{layer.name}: calibrated on {len(importance)} inputs, the weight has {layer.weight.shape[1]}; "
                "calibrate this model"
            )
        for config in layer.configs:
            if config is not None:
                check_calibrated(config, layer.name, calibration.mode)
                if config.rotation:
                    raise ValueError(
                        f"{layer.name}: rotation mixes the inputs by which a calibration weighs errors; search without "
                        "a calibration"
                    )


def _some_batches(calibration: Calibration) -> list[Any]:
    """Batches of about MEASURED_TOKENS tokens in all, spread evenly over those of the calibration."""
    batches = calibration.batches
    tokens = max(calibration.tokens.values()) * len(batches) // calibration.passes
    step = max(1, tokens // MEASURED_TOKENS)
    return batches[::step]


def _earlier_layers(path: Path, model: nn.Module, candidates: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers measured in the file ``path``; none where there is no file or it is of other candidates."""
    if not path.exists():
        return {}
    stored = Sensitivity.load(path)
    stored.check_model(model, path)
    if stored.candidates != list(candidates):
        return {}
    return {name: layer for name, layer in stored.layers.items() if layer["key"]}


def random_tokens(vocabulary: int, length: int = 256, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """One batch of ``input_ids`` ``[count, length]``, uniformly random below ``vocabulary``: no text is needed."""
    return [{"input_ids": random_ids(vocabulary, count, length, seed)}]
