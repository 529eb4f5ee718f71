"""benchmarks.generate on two small layers; llama.cpp takes part where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generate
from benchmarks.decode import gguf_file
from benchmarks.decode.hf_runner import HfRunner, assemble
from benchmarks.decode.weights import EMBEDDING, llama_1b, quantized, random_weights, total_bytes
from hqqtensor.generation import prepare_for_generation_

TINY = ["--models", "small", "--contexts", "9", "--new", "5", "--rounds", "1"]


def test_main_writes_a_row_for_each_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    generate.main([*TINY, "--plain", "--batch", "2", "--json", str(file)])
    rows = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    assert {"hqqtensor", "hqqtensor, not prepared", "dense bf16"} <= set(rows)
    assert all(r["tokens/s"] > 0 and r["first token, s"] > 0 and r["batch"] == 2 for r in rows.values())
    packed = quantized(random_weights(llama_1b(small=True)), 4)
    assert rows["hqqtensor"]["MB"] == pytest.approx(total_bytes(packed) / 1e6, rel=0.02)
    if gguf_file.available() is None:
        assert rows["llama.cpp"]["MB"] == pytest.approx(rows["hqqtensor"]["MB"], rel=0.02)
    assert "prompt of 9 tokens, batch 2" in capsys.readouterr().out


def test_the_clock_sees_every_token_and_changes_none() -> None:
    config = llama_1b(small=True)
    model = assemble(config, quantized(random_weights(config), 4), torch.float32)
    ids = torch.arange(10, 19).unsqueeze(0)
    times, tokens = HfRunner("", "ours", prepare_for_generation_(model)).generate(ids, 6)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert len(times) == 6 and times == sorted(times) and tokens[0] == plain[0, 9:].tolist()


def test_layers_that_are_not_named_share_the_weights_of_the_first() -> None:
    config = llama_1b(small=True)
    weights = random_weights(config, shared=True)
    model: Any = assemble(config, quantized(weights, 4), torch.bfloat16)
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    assert first.qdata.data_ptr() == second.qdata.data_ptr()
    assert not any(".layers.1." in name for name in weights)


def test_names_of_every_weight_in_gguf() -> None:
    names = {gguf_file.gguf_name(name) for name in random_weights(llama_1b(small=True))}
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    layers = {f"blk.{i}.{part}.weight" for i in range(2) for part in parts}
    assert names == layers | {"token_embd.weight", "output_norm.weight"}
    assert gguf_file.gguf_name(EMBEDDING) == "token_embd.weight"
