"""``quantize``: a dry run, presets and formats, and where the bytes are."""

import json
import os
from pathlib import Path

import pytest

from hqqtensor import PRESETS, HqqConfig
from hqqtensor.cli import main, model_dir
from hqqtensor.cli.next_command import command_to_try
from hqqtensor.diagnostics import model_size


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_a_dry_run_tells_the_size_that_comes_out_and_writes_nothing(small: Path, tmp_path, capsys, monkeypatch) -> None:
    command = ("quantize", small / "dense", tmp_path / "out", "--bits", 3, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(model_dir, "open_dense", None)
        assert run(*command, "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)
    assert os.listdir(tmp_path) == [] and told["dry_run"]
    assert run(*command) == 0
    done = json.loads(capsys.readouterr().out)
    assert (told["bytes_before"], told["bytes_after"]) == (done["bytes_before"], done["bytes_after"])
    assert told["parts"] == done["parts"] and told["config"] == done["config"]
    assert run(*command[:-1], "--dry-run", "--overwrite") == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj.weight" in text and "nothing was written" in text


def test_the_parts_are_all_bytes_of_the_model(small: Path, tmp_path: Path, capsys) -> None:
    assert run("quantize", small / "dense", tmp_path / "out", "--layers", "mlp.up_proj=none") == 0
    text = capsys.readouterr().out
    assert (
        run("quantize", small / "dense", tmp_path / "out", "--layers", "mlp.up_proj=none", "--overwrite", "--json") == 0
    )
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert list(parts) == ["layers", "embedding", "output layer", "left dense"]
    model = model_dir.open_quantized(tmp_path / "out")
    assert sum(p["code_bytes"] + p["metadata_bytes"] for p in parts.values()) == model_size(model).nbytes
    assert sum(p["weights"] for p in parts.values()) == model_size(model).parameters
    head = model.lm_head.weight
    assert parts["output layer"]["code_bytes"] == head.qdata.nbytes == head.numel()
    assert parts["left dense"]["metadata_bytes"] == 0 and parts["left dense"]["bits_per_weight"] == 32
    assert "where the bytes are" in text and text.splitlines()[-1].startswith("try it: hqqtensor chat ")


def test_the_command_to_try_suits_the_model(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(small)
    assert command_to_try(small / "packed") == "hqqtensor chat packed"
    (tmp_path / "config.json").write_text((small / "packed" / "config.json").read_text())
    assert command_to_try(tmp_path).startswith("hqqtensor bench ")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert command_to_try(tmp_path).endswith(" -p 'Once upon a time'")


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--preset", "3"], PRESETS["3"]),
        (["--preset", "4/64"], PRESETS["4/64"]),
        (["--preset", "8/64", "--embeddings", "8"], HqqConfig(8, 64, embedding_nbits=8)),
        (["--format", "nf4"], HqqConfig(4, format="nf4", embedding_nbits=8)),
        (["--format", "fp6"], HqqConfig(6, format="fp6", embedding_nbits=8)),
        (["--format", "codebook", "--bits", "2"], HqqConfig(2, format="codebook", embedding_nbits=8)),
    ],
)
def test_presets_and_formats_are_those_of_the_package(small: Path, capsys, args: list[str], want: HqqConfig) -> None:
    assert run("quantize", small / "dense", "nowhere", *args, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["config"] == want.to_dict()


def test_a_format_is_written(small: Path, tmp_path: Path) -> None:
    assert run("quantize", small / "dense", tmp_path / "out", "--format", "fp4", "--json") == 0
    weight = model_dir.open_quantized(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert weight.format == "fp4" and weight.nbits == 4
