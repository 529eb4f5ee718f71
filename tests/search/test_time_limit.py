"""The search ends in time: what is measured first, what the rest is taken for, and what it says beforehand."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, EMBEDDINGS, choose_config, measure_sensitivity, sensitivity
from hqqtensor.search.layers import layers_of, measuring_order, spread
from hqqtensor.search.pace import Pace

PASS = 10.0
META = {"quant_scale": True, "quant_zero": True, "meta_nbits": 4}
BATCHES = [torch.randn(16, 64, generator=torch.Generator().manual_seed(1))]


class Clock:
    """Stands still but for the passes through a model, which take ``PASS`` seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def stack(clock: Clock, count: int = 6) -> nn.Sequential:
    """Layers of one kind; each pass takes its time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(count)))

    def tick(*_: object) -> None:
        clock.now += PASS

    model.register_forward_hook(tick)
    return model


@pytest.mark.parametrize(("limit", "measured"), [(1e-9, "0"), (29, "0"), (30, "05"), (55, "0521"), (70, "051234")])
def test_measuring_ends_within_the_limit(clock: Clock, limit: float, measured: str) -> None:
    model, started, seen = stack(clock), clock.now, []
    found = measure_sensitivity(
        model, batches=BATCHES, time_limit=limit, progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert sorted(name for _, _, name in seen) == sorted(measured)
    assert [(done, total) for done, total, _ in seen] == [(i, 6) for i in range(1, len(measured) + 1)]
    assert found.estimated == [name for name in "012345" if name not in measured]
    assert list(found.layers) == list("012345")
    assert clock.now - started <= max(limit, 2 * PASS)  # the dense model and one layer at least


def test_estimates_lie_between_the_layers_measured(clock: Clock) -> None:
    candidates = ({"nbits": 2, "group_size": 16, **META}, {"nbits": 4, "group_size": 32, **META})
    found = measure_sensitivity(stack(clock), None, BATCHES, candidates, time_limit=3 * PASS)
    first, last = found.layers["0"]["loss"], found.layers["5"]["loss"]
    for place in (1, 2, 3, 4):
        entry = found.layers[str(place)]
        assert entry["bytes"] == found.layers["0"]["bytes"]
        assert entry["loss"] == pytest.approx([a + (b - a) * place / 5 for a, b in zip(first, last, strict=True)])


def test_the_choice_from_estimates_keeps_the_target(clock: Clock) -> None:
    model = stack(clock)
    choice = choose_config(model, measure_sensitivity(model, batches=BATCHES, time_limit=1), target_bpw=3.5)
    quantize_(model, choice.config)
    assert model_size(model).quantized_nbytes == choice.nbytes and 3.2 < choice.bits_per_weight <= 3.5


def test_a_kind_that_was_not_measured_loses_four_times_less_with_each_bit(clock: Clock) -> None:
    model = nn.Sequential(stack(clock, 1), nn.Linear(64, 256))
    candidates = [{"nbits": 2, "group_size": None}, {"nbits": 3, "group_size": None}, {"nbits": 4, "group_size": 128}]
    found = measure_sensitivity(model, candidates=candidates, batches=BATCHES, time_limit=1)
    assert found.estimated == ["1"]
    a, b, missing = found.layers["1"]["loss"]
    assert a == pytest.approx(4 * b) and b > 0 and missing is None


def test_weights_alone_keep_the_limit_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = sensitivity.measure_layer

    def slowly(*args):
        clock.now += PASS
        return measure(*args)

    monkeypatch.setattr(sensitivity, "measure_layer", slowly)
    found = measure_sensitivity(stack(clock), time_limit=25)
    assert found.method == "weights" and len(found.estimated) == 4


def test_a_file_holds_what_was_measured_and_the_next_run_goes_on(clock: Clock, tmp_path: Path) -> None:
    model, file = stack(clock), tmp_path / "s.json"
    for count in (1, 2, 3):
        found = measure_sensitivity(model, batches=BATCHES, file=file, time_limit=1)
        assert len(json.loads(file.read_text())["layers"]) == count == 6 - len(found.estimated)
    whole = measure_sensitivity(model, batches=BATCHES)
    assert not whole.estimated
    assert all(found.layers[name] == whole.layers[name] for name in json.loads(file.read_text())["layers"])
    found.save(file)
    assert measure_sensitivity(model, batches=BATCHES, file=file) == whole  # estimates are measured, not trusted


@pytest.mark.parametrize(("known", "told"), [(0, [(50.0, 5)]), (2, [(30.0, 3)]), (5, []), (6, [])])
def test_the_time_is_told_once_when_a_layer_was_timed(clock: Clock, tmp_path: Path, known: int, told) -> None:
    model, file = stack(clock), tmp_path / "s.json"
    if known:
        measure_sensitivity(model, batches=BATCHES, file=file, time_limit=(known + 1) * PASS)
    said = []
    measure_sensitivity(model, batches=BATCHES, file=file, announce=lambda *what: said.append(what))
    assert said == told


def test_time_is_foretold_from_passes_and_from_the_weights_to_quantize() -> None:
    candidates = ({"nbits": 3, "group_size": 32}, {"nbits": 3, "group_size": 32, "solver": "rtn"})
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256))
    small, large = layers_of(model, HqqConfig(), candidates)
    pace = Pace(None)
    pace.pass_seconds = 10
    pace.add(small, 24)  # two solvers, each with a pass, and 4 seconds for the weights
    assert pace.expect([small]) == 24 and pace.expect([small, large]) == 24 + 20 + 16


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit must be over 0 seconds"):
        measure_sensitivity(nn.Sequential(nn.Linear(64, 64)), time_limit=limit)


def test_ends_and_middles_come_first() -> None:
    assert [spread(n) for n in (1, 2, 3, 5)] == [[0], [0, 1], [0, 2, 1], [0, 4, 2, 1, 3]]
    assert all(sorted(spread(n)) == list(range(n)) for n in range(1, 40))


def test_embeddings_come_first_and_kinds_take_turns() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)}) for _ in range(3))
    model = nn.ModuleDict({"blocks": blocks, "embed": nn.Embedding(1024, 64)})
    order = [layer.name for layer in measuring_order(layers_of(model, HqqConfig(), (*CANDIDATES, *EMBEDDINGS)))]
    assert order == ["embed", *(f"blocks.{i}.{kind}" for i in (0, 2, 1) for kind in ("up", "down"))]
