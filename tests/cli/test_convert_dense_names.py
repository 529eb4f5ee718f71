"""``convert --to hqq`` names the modules that are really dense."""

import json
from pathlib import Path

import pytest

from hqqtensor.cli import main

PLAIN = ["--bits", "4", "--group-size", "64", "--solver", "hqq_joint", "--embeddings", "none"]


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (["--skip"], ["embed_tokens"]),
        ([], ["embed_tokens", "lm_head"]),
        (["--skip", "lm_head", "--layers", "o_proj=none"], ["embed_tokens", "lm_head", "o_proj"]),
        (["--skip", "layers.1.mlp.up_proj"], ["embed_tokens", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_skip_modules_are_what_is_dense(tiny: Path, tmp_path: Path, options: list[str], dense: list[str]) -> None:
    assert main(["quantize", str(tiny), str(tmp_path / "ours"), *PLAIN, *options, "--json"]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hqq"), "--to", "hqq", "--json"]) == 0
    entry = json.loads((tmp_path / "hqq" / "config.json").read_text())["quantization_config"]
    assert entry["skip_modules"] == dense
