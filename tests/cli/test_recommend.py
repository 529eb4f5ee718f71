"""``recommend``: sizes are what quantizing gives, and the command it names works."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from hqqtensor.cli import main, model_dir, recommend
from hqqtensor.diagnostics import model_size


def advice(capsys, *args: object) -> dict:
    assert main(["recommend", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_are_those_of_the_models_that_the_commands_write(small: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    told = advice(capsys, small / "dense", "--memory", "1GB", "--seconds", 0)
    by_name = {setting["name"]: setting for setting in told["settings"]}
    assert list(by_name) == ["dense", "8", "6", "4", "3 good", "3", "2 good"] and told["recommended"] == "8"
    for name in ("4", "3"):
        assert main([*shlex.split(by_name[name]["command"])[1:], "--json"]) == 0
        written = model_dir.open_quantized(json.loads(capsys.readouterr().out)["out_dir"])
        # Scales of the 8-bit embedding are float16 here and there.
        assert model_size(written).nbytes == by_name[name]["weight_bytes"]
    assert told["command"] == by_name["8"]["command"]


def test_a_budget_decides_and_the_cache_counts(small: Path, capsys) -> None:
    told = advice(capsys, small / "dense", "--memory", "1GB", "--seconds", 0)
    sizes = {setting["name"]: setting["weight_bytes"] for setting in told["settings"]}
    assert told["context"] == 256  # positions of the model
    assert told["cache_bytes"] == 2 * 2 * 1 * 32 * 256 * 4
    for name in ("6", "4", "3 good"):
        budget = sizes[name] + told["cache_bytes"]
        assert advice(capsys, small / "dense", "--memory", budget, "--seconds", 0)["recommended"] == name
        smaller = advice(capsys, small / "dense", "--memory", budget - 1, "--seconds", 0)["recommended"]
        assert list(sizes).index(smaller) > list(sizes).index(name)


def test_speed_takes_the_fastest_setting_that_is_fair() -> None:
    measured = recommend.MEASURED
    settings = [
        recommend.Setting("dense", [], 100, None, 9.0, True),
        recommend.Setting("8", [], 50, measured["8"], 3.0, True),
        recommend.Setting("4", [], 30, measured["4"], 5.0, True),
        recommend.Setting("2 good", [], 20, measured["2 good"], 7.0, True),
    ]
    assert recommend.choose_one(settings, speed=False).name == "8"
    assert recommend.choose_one(settings, speed=True).name == "4"  # 2 bits are poor


def test_speeds_are_measured_on_the_models_shapes(small: Path, capsys) -> None:
    told = advice(capsys, small / "dense", "--memory", "1GB", "--seconds", 0.01)
    assert all(setting["tokens_per_second"] > 0 for setting in told["settings"])
    assert main(["recommend", str(small / "dense"), "--memory", "1GB", "--seconds", "0"]) == 0
    text = capsys.readouterr().out
    assert "<- this one" in text and "hqqtensor quantize" in text and "80% (SmolLM2)" in text


def test_products_are_those_of_one_token(small: Path) -> None:
    empty = model_dir.empty_model_of(small / "dense")
    products = recommend.products_of(empty, None)
    vocabulary = empty.config.vocab_size
    assert {(p.out_features, p.in_features): n for p, n in products.items()} == {
        (64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2, (vocabulary, 64): 1,
    }  # fmt: skip


def test_experts_count_as_often_as_a_token_uses_them() -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
            )
        )  # fmt: skip
    products = {(p.out_features, p.in_features): n for p, n in recommend.products_of(model, None).items()}
    assert products[192, 64] == 2 and products[64, 96] == 2


def test_without_memory_what_is_free_counts(small: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(recommend, "free_memory", lambda: 1e9)
    assert advice(capsys, small / "dense", "--seconds", 0)["memory_bytes"] == 1_000_000_000


@pytest.mark.parametrize("context", [1, 1000])
def test_the_cache_is_as_long_as_the_context_asked_for(small: Path, capsys, context: int) -> None:
    told = advice(capsys, small / "dense", "--memory", "1GB", "--seconds", 0, "--context", context)
    assert told["cache_bytes"] == 512 * context
