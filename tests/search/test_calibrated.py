"""The search with a calibration: what it measures on, and that it measures what quantize_ will do."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, EMBEDDINGS, LEARNED, choose_config, measure_sensitivity, sensitivity

ONE = ({"nbits": 3, "group_size": 32},)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


def make_batches(count: int, tokens: int = 64, seed: int = 0) -> list[torch.Tensor]:
    """Inputs that differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 64, generator=generator) * torch.logspace(-2, 1, 64) for _ in range(count)]


@pytest.mark.parametrize("name", ["0", "2"])
def test_a_loss_is_that_of_the_layer_quantized_with_the_calibration(name: str) -> None:
    model, batches = make_model(), make_batches(1)
    calibration = calibrate(model, batches, "diagonal")
    found = measure_sensitivity(model, candidates=ONE, calibration=calibration)
    quantized = copy.deepcopy(model)
    quantize_(
        quantized, HqqConfig(3, 32, solver="column_scaled"), filter_fn=lambda _, n: n == name, calibration=calibration
    )
    with torch.no_grad():
        dense, outputs = (m(batches[0]) for m in (model, quantized))
    assert found.layers[name]["loss"][0] == pytest.approx(
        float((outputs - dense).square().sum() / dense.square().sum()), rel=1e-4
    )
    assert found.layers[name]["bytes"] == [quantized[int(name)].weight.nbytes]


def test_a_calibration_lowers_the_loss_of_a_layer_whose_inputs_differ_in_size() -> None:
    model, batches = make_model(), make_batches(1)
    with_it = measure_sensitivity(model, candidates=ONE, calibration=calibrate(model, batches, "full"))
    without = measure_sensitivity(model, None, batches, ONE)
    assert with_it.layers["0"]["loss"][0] < 0.8 * without.layers["0"]["loss"][0]


def test_settings_are_compared_by_errors_that_inputs_weigh() -> None:
    model = make_model()
    calibration = calibrate(model, make_batches(1), "full")
    two = ({"nbits": 3, "group_size": 32}, {"nbits": 2, "group_size": 16})
    losses = measure_sensitivity(model, HqqConfig(solver="hqq_joint"), candidates=two, calibration=calibration).layers[
        "0"
    ]["loss"]
    importance, dense = calibration.moments["0"], model[0].weight.detach()
    errors = []
    for settings in two:
        quantized = copy.deepcopy(model)
        config = HqqConfig(settings["nbits"], settings["group_size"], solver="hqq_joint")
        quantize_(quantized, config, filter_fn=lambda _, n: n == "0", calibration=calibration, quality="fast")
        errors.append(float(((quantized[0].weight.dequantize() - dense).square() * importance).sum()))
    assert losses[1] / losses[0] == pytest.approx(errors[1] / errors[0], rel=1e-4)


def test_outputs_are_compared_on_a_few_thousand_tokens_of_the_calibration() -> None:
    model, batches = make_model(), make_batches(9, 1024)
    calibration = calibrate(model, batches, "full")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(next(i for i, b in enumerate(batches) if b is args[0])))
    measure_sensitivity(model, candidates=ONE, calibration=calibration)
    assert seen == [0, 4, 8] * 3  # of the dense model, and with each layer quantized


def test_batches_that_are_given_come_before_those_of_the_calibration() -> None:
    model, other = make_model(), make_batches(1, seed=1)
    calibration = calibrate(model, make_batches(1), "full")
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    measure_sensitivity(model, batches=other, candidates=ONE, calibration=calibration)
    assert len(seen) == 3 and all(x is other[0] for x in seen)


def test_a_file_serves_the_same_calibration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, batches = make_model(), tmp_path / "s.json", make_batches(1)
    first = calibrate(model, batches, "full")
    second = calibrate(model, make_batches(1, seed=1), "full")
    plain = measure_sensitivity(model, batches=batches, candidates=ONE, file=file)
    one = measure_sensitivity(model, batches=batches, candidates=ONE, file=file, calibration=first)
    with monkeypatch.context() as nothing_is_measured:
        nothing_is_measured.setattr(sensitivity, "measure_layer", None)
        again = measure_sensitivity(model, batches=batches, candidates=ONE, file=file, calibration=first)
    other = measure_sensitivity(model, batches=batches, candidates=ONE, file=file, calibration=second)
    assert again == one
    keys = [{layer["key"] for layer in found.layers.values()} for found in (plain, one, other)]
    assert len(set.union(*keys)) == 6


@pytest.mark.parametrize("quality", ["fast", "good", "best"])
def test_what_was_found_is_quantized_with_the_same_calibration(quality: str) -> None:
    model = make_model()
    calibration = calibrate(model, make_batches(2), "full")
    choice = choose_config(model, measure_sensitivity(model, calibration=calibration), target_bpw=3.0)
    quantize_(model, choice.config, calibration=calibration, quality=quality)
    assert model_size(model).quantized_nbytes == choice.nbytes and choice.bits_per_weight <= 3.0


def test_an_embedding_is_measured_on_the_batches_and_quantized_without_calibration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1024, 64), nn.Linear(64, 32)).eval()
    batches = [torch.arange(256).view(4, 64)]
    calibration = calibrate(model, batches, "full")
    found, plain = (
        measure_sensitivity(model, HqqConfig(), batches, (*ONE, *EMBEDDINGS), calibration=c)
        for c in (calibration, None)
    )
    assert found.layers["0"] == plain.layers["0"] and found.layers["1"] != plain.layers["1"]


@pytest.mark.parametrize(
    ("config", "candidates", "message"),
    [
        (HqqConfig(), LEARNED, "0: calibration serves format 'int' and axis 1, got 'codebook'"),
        (HqqConfig(), [{**ONE[0], "solver": "rtn"}], "0: calibration serves hqq_joint and column_scaled"),
        (HqqConfig(rotation=True), ONE, "0: rotation mixes the inputs by which a calibration weighs errors"),
    ],
)
def test_what_calibration_does_not_serve_is_told_before_anything_is_measured(
    config: HqqConfig, candidates, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    calibration = calibrate(model, make_batches(1), "full")
    monkeypatch.setattr(HQQTensor, "from_hp", None)
    with pytest.raises(ValueError, match=message):
        measure_sensitivity(model, config, candidates=candidates, calibration=calibration)


def test_a_calibration_of_another_model_is_refused() -> None:
    calibration = calibrate(make_model(), make_batches(1), "full")
    other = nn.Sequential(nn.Linear(128, 64))
    with pytest.raises(ValueError, match="0: calibrated on 64 inputs, the weight has 128; calibrate this model"):
        measure_sensitivity(other, candidates=CANDIDATES, calibration=calibration)
