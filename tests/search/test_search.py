import contextlib
import json

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.diagnostics import model_size
from hqqtensor.search import (
    CANDIDATES,
    LEARNED,
    Sensitivity,
    check_target,
    choose_config,
    measure_sensitivity,
    random_tokens,
    sensitivity,
)
from hqqtensor.search.layers import fitting
from hqqtensor.stored_size import stored_bytes


class Net(nn.Module):
    """A plain stack whose first layer matters a hundred times more to the output than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(128, 128, bias=False) for _ in range(3))
        self.lm_head = nn.Linear(128, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 0.01 * self.third(torch.relu(self.second(x)))


BATCHES = [torch.randn(64, 128, generator=torch.Generator().manual_seed(1))]


def bits_of(config: HqqConfig) -> dict[str, int]:
    return {name: entry["nbits"] for name, entry in (config.dynamic_config or {}).items() if entry}


def test_what_matters_to_the_output_gets_more_bits():
    model = Net()
    choice = choose_config(model, measure_sensitivity(model, batches=BATCHES), target_bpw=4.0)
    bits = bits_of(choice.config)
    assert bits["first"] > max(bits["second"], bits["third"])


@pytest.mark.parametrize("target", [2.4, 3.0, 4.25, 8.0])
def test_the_quantized_model_stays_within_the_average_and_is_counted_right(target):
    model = Net()
    choice = choose_config(model, measure_sensitivity(model), target_bpw=target)
    quantize_(model, choice.config)
    size = model_size(model)
    assert size.quantized_nbytes == choice.nbytes
    assert size.bits_per_weight == pytest.approx(choice.bits_per_weight)
    assert target - 0.6 < size.bits_per_weight <= target
    assert not isinstance(model.lm_head.weight, HQQTensor)


@pytest.mark.parametrize(("spread", "meta_nbits"), [(0.0, 4), (2.0, 8)])
def test_metadata_takes_eight_bits_only_where_rows_differ_much_in_size(spread, meta_nbits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(256, 256) * torch.exp(spread * torch.randn(256, 1)))
    plain = HqqConfig(solver="hqq_joint")
    choice = choose_config(model, measure_sensitivity(model, plain), plain, target_bpw=4.3)
    assert choice.config.dynamic_config["0"]["meta_nbits"] == meta_nbits
    assert list(choice.counts) == [f"4-bit g{32 if meta_nbits == 4 else 64}, {meta_nbits}-bit metadata"]


def test_a_target_in_bytes_counts_what_stays_dense():
    model = Net()
    choice = choose_config(model, measure_sensitivity(model), target_bytes=30_000)
    quantize_(model, choice.config)
    assert 25_000 < model_size(model).nbytes <= 30_000


def test_settings_that_do_not_fit_a_layer_are_not_chosen():
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 64))
    found = measure_sensitivity(model)
    assert None in found.layers["0"]["bytes"]
    quantize_(model, choose_config(model, found, target_bpw=5.0).config)


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    model, file = Net(), tmp_path / "s.json"

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, file=file, progress=stop)
    assert list(json.loads(file.read_text())["layers"]) == ["first", "second"]
    measured = []
    real = sensitivity.measure_layer
    monkeypatch.setattr(sensitivity, "measure_layer", lambda *a: measured.append(a[0].weight) or real(*a))
    assert measure_sensitivity(model, file=file).layers == measure_sensitivity(Net()).layers
    assert measured[0] is model.third.weight and len(measured) == 1 + 3


def test_other_weights_or_settings_are_measured_again(tmp_path):
    model, file = Net(), tmp_path / "s.json"
    first = measure_sensitivity(model, file=file)
    with torch.no_grad():
        model.second.weight.mul_(2)
    second = measure_sensitivity(model, file=file)
    assert first.layers["second"]["key"] != second.layers["second"]["key"]
    assert first.layers["first"] == second.layers["first"]
    assert measure_sensitivity(model, HqqConfig(solver="rtn"), file=file).layers["first"] != first.layers["first"]


def test_measuring_leaves_the_model_alone():
    model = Net().train()
    measure_sensitivity(model, batches=BATCHES)
    assert model.training
    expected = Net().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("stop", [False, True])
def test_every_module_gets_its_own_mode_back(stop):
    model = Net().train()
    model.second.eval()
    modes = [module.training for module in model.modules()]
    during = []

    def look(*_args):
        during.extend(module.training for module in model.modules())
        if stop and len(during) > len(modes):
            raise KeyboardInterrupt

    model.third.register_forward_hook(look)
    with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
        measure_sensitivity(model, batches=BATCHES)
    assert [module.training for module in model.modules()] == modes
    assert during and not any(during)
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


def test_tied_weights_get_one_setting():
    model = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Linear(128, 128)})
    model["b"].weight = model["a"].weight
    choice = choose_config(model, measure_sensitivity(model), target_bpw=4.0)
    quantize_(model, choice.config)
    assert model["a"].weight is model["b"].weight


def test_bad_targets_and_files_are_refused_with_the_reason(tmp_path):
    model = Net()
    found = measure_sensitivity(model)
    with pytest.raises(ValueError, match=r"budget is too small.*2\.2.* bits"):
        choose_config(model, found, target_bpw=1.0)
    with pytest.raises(ValueError, match="too small"):
        choose_config(model, found, target_bytes=100)
    for targets in ({}, {"target_bpw": 3.0, "target_bytes": 10}):
        with pytest.raises(ValueError, match="one of"):
            choose_config(model, found, **targets)
    with pytest.raises(ValueError, match="not in the sensitivities"):
        choose_config(nn.Sequential(nn.Linear(128, 128)), found, target_bpw=3.0)
    with pytest.raises(ValueError, match="dynamic_config may only leave some dense"):
        measure_sensitivity(model, HqqConfig(dynamic_config={"first": {"nbits": 2}}))
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"version": 7}'):
        bad.write_text(text)
        with pytest.raises(ValueError, match="no sensitivity file"):
            Sensitivity.load(bad)


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="outputs are not finite on these batches"):
        measure_sensitivity(Net(), batches=[torch.full((1, 128), torch.inf)])


def test_what_an_interrupted_file_holds_stays_in_it_until_it_is_used(tmp_path):
    model, file = Net(), tmp_path / "s.json"
    measured = measure_sensitivity(model, file=file).layers

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, file=file, progress=stop)
    assert json.loads(file.read_text())["layers"] == measured


MANY = [
    *CANDIDATES, *LEARNED, {"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": None},
    {"nbits": 2, "group_size": 48, "quant_scale": True, "quant_zero": False, "meta_nbits": 4},
    {"nbits": 2, "group_size": None, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    {"nbits": 4, "group_size": 40, "axis": 0, "quant_scale": True, "quant_zero": True},
    {"nbits": 4, "group_size": None, "axis": 0}, {"nbits": 4, "group_size": 32, "format": "nf4"},
    {"nbits": 3, "group_size": 32, "format": "codebook", "codebook": "row", "scale_dtype": torch.bfloat16},
    {"nbits": 4, "group_size": 64, "solver": "column_scaled", "scale_dtype": torch.float32},
    {"nbits": 4, "group_size": 64, "solver": "rtn", "rotation": True},
    {"nbits": 4, "group_size": 7, "scale_dtype": "float16"},
]  # fmt: skip


@pytest.mark.parametrize("shape", [(200, 136), (130, 128), (2, 3, 40, 72)], ids=str)
@pytest.mark.parametrize("settings", MANY, ids=str)
def test_sizes_are_told_without_quantizing(settings, shape):
    config = HqqConfig(**settings)
    if fitting(config, shape) and not (len(shape) > 2 and config.format == "codebook"):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert stored_bytes(shape, config) == HQQTensor.from_hp(weight, config).nbytes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_bpw": 1.0}, r"the smallest settings take 2\.258 bits a weight \(22128 bytes with all other parameters"
         r"\), the largest 8\.391 bits a weight \(59808 bytes with all other parameters\), the target is 1\.0 bits"),
        ({"target_bytes": 100}, r"\(22128 bytes with all .* \(59808 bytes with all .* the target is 100 bytes"),
        ({"target_bpw": 0.0}, "target_bpw must be over 0 and finite, got 0.0"),
        ({"target_bpw": float("inf")}, "target_bpw must be over 0 and finite, got inf"),
        ({"target_bpw": float("nan")}, "target_bpw must be over 0 and finite, got nan"),
        ({}, "give one of target_bpw and target_bytes"),
        ({"target_bpw": 3.0, "candidates": [{"group_size": 512}]}, r"first: none of the candidates' group sizes fits"),
    ],
)  # fmt: skip
def test_an_impossible_target_is_told_before_anything_is_measured(monkeypatch, target, message):
    monkeypatch.setattr(HQQTensor, "from_hp", None)
    for model in (Net(), Net().to("meta")):
        with pytest.raises(ValueError, match=message):
            check_target(model, **target)


@pytest.mark.parametrize("target", [{"target_bpw": 2.3}, {"target_bytes": 22_128}, {"target_bpw": 40.0}])
def test_a_target_that_is_not_refused_can_be_reached(target):
    model = Net()
    check_target(model, **target)
    choose_config(model, measure_sensitivity(model), **target)


def test_a_model_without_weights_to_choose_for_is_refused():
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 64)})
    with pytest.raises(ValueError, match="no weights to choose settings for"):
        check_target(model, target_bpw=3.0)


def test_a_layer_that_nothing_fits_is_told_before_anything_is_measured(monkeypatch):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(8, 128))
    monkeypatch.setattr(HQQTensor, "from_hp", None)
    with pytest.raises(ValueError, match=r"2: none of the candidates' group sizes fits a weight of shape \[128, 8\]"):
        measure_sensitivity(model)


def test_a_tied_weight_is_quantized_wherever_it_is_used_while_it_is_measured():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.third.weight = self.second.weight

    model, dense = Tied(), []
    model.third.register_forward_hook(lambda *_: dense.append(isinstance(model.third.weight, HQQTensor)))
    measure_sensitivity(model, batches=BATCHES)
    assert dense == [False, False, True]  # nothing, the first layer, the two that share a weight


def test_random_tokens_are_the_same_for_a_seed():
    a, b = (random_tokens(100, 16, 4, seed)[0]["input_ids"] for seed in (3, 3))
    assert torch.equal(a, b) and a.shape == (4, 16) and 0 <= a.min() <= a.max() < 100
