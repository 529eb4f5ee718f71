"""``hqqtensor quantize --target-*``: embedding and calibration included, a time limit, weights alone."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import calibrate, data
from hqqtensor.cli import main, model_dir
from hqqtensor.cli.output import duration
from hqqtensor.search import CANDIDATES, EMBEDDINGS, choose_config, measure, measure_sensitivity


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.batches_of, "__defaults__", (None, 512, 0, 4, None))


def test_settings_are_found_and_quantized_with_one_calibration(
    tiny: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = data._written
    monkeypatch.setattr(data, "_written", lambda *args: written.append(args) or write(*args))
    args = ("--target-bpw", 3, "--calibrate", "self", "--quality", "good", "--json")
    assert run("quantize", tiny, tmp_path / "out", *args) == 0
    assert len(written) == 1
    summary = json.loads(capsys.readouterr().out)
    assert 2.5 < summary["bits_per_weight"] <= 3.0
    assert summary["search"]["method"] == "outputs"
    assert (summary["search"]["measured"], summary["search"]["estimated"]) == (16, 0)

    want = transformers.LlamaForCausalLM.from_pretrained(tiny).eval()
    calibration, config = calibrate(want, "self", "full"), HqqConfig(embedding_nbits=8)
    found = measure_sensitivity(want, config, candidates=(*CANDIDATES, *EMBEDDINGS), calibration=calibration)
    quantize_(want, choose_config(want, found, config, target_bpw=3).config, calibration=calibration, quality="good")
    got = model_dir.open_quantized(tmp_path / "out")
    for (name, a), (_, b) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert type(a) is type(b) and torch.equal(a, b), name


@pytest.mark.parametrize("target", [("--target-bpw", 3.2), ("--target-size", "200KB")])
def test_the_target_counts_embedding_and_output_layer(tiny: Path, tmp_path: Path, capsys, target) -> None:
    assert run("quantize", tiny, tmp_path / "out", *target, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    model = model_dir.open_quantized(tmp_path / "out")
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert all(isinstance(weight, HQQTensor) for weight in weights)
    assert any(weight.nbits < 8 for weight in weights)
    if target[0] == "--target-bpw":
        assert 2.8 < summary["bits_per_weight"] <= 3.2
    else:
        assert 190_000 < summary["bytes_after"] <= 200_000


def test_bits_that_are_given_for_the_embeddings_stay_outside_of_the_search(tiny: Path, tmp_path: Path, capsys) -> None:
    args = ("--target-bpw", 3.2, "--embeddings", 6, "--fast", "--json")
    assert run("quantize", tiny, tmp_path / "out", *args) == 0
    assert json.loads(capsys.readouterr().out)["search"]["measured"] == 14
    model = model_dir.open_quantized(tmp_path / "out")
    assert model.model.embed_tokens.weight.nbits == model.lm_head.weight.nbits == 6


@pytest.mark.parametrize("calibrated", [(), ("--calibrate", "random", "--quality", "good")])
def test_fast_runs_the_model_for_no_measurement(tiny: Path, tmp_path: Path, capsys, monkeypatch, calibrated) -> None:
    monkeypatch.setattr(measure.Outputs, "_run", None)
    assert run("quantize", tiny, tmp_path / "out", "--target-bpw", 3.2, "--fast", *calibrated, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["search"]["method"] == "weights" and 2.8 < summary["bits_per_weight"] <= 3.2


def test_a_time_limit_leaves_layers_to_estimates_and_says_so(tiny: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "s.json"
    args = ("--target-bpw", 3.2, "--time-limit", 1e-9, "--sensitivity", file)
    assert run("quantize", tiny, tmp_path / "out", *args) == 0
    said = capsys.readouterr().err
    assert "measuring 15 more layers takes about" in said and "--time-limit ends it after 1 s" in said
    assert "1 of 16 layers were measured; the losses of the others are estimated" in said
    assert len(json.loads(file.read_text())["layers"]) == 1
    assert run("quantize", tiny, tmp_path / "json", *args, "--json") == 0
    output = capsys.readouterr()
    assert output.err == ""
    found = json.loads(output.out)["search"]
    assert (found["measured"], found["estimated"]) == (2, 14) and sum(found["settings"].values()) == 16


def test_times_are_told_in_seconds_or_minutes() -> None:
    assert [duration(s) for s in (0.2, 40.4, 89, 100, 3600)] == ["1 s", "40 s", "89 s", "2 min", "60 min"]
