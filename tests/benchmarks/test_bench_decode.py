"""benchmarks.cpu_decode on two small layers, eagerly; llama.cpp takes part where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_decode
from benchmarks.contender import WrongAnswer
from benchmarks.decode import gguf_file
from benchmarks.decode.torch_runner import TorchRunner
from benchmarks.decode.weights import EMBEDDING, llama_1b, quantized, random_weights, total_bytes

TINY = ["--small", "--no-compile", "--bits", "4", "--dtypes", "fp32", "--prompts", "8", "12"]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_main_writes_speeds_and_real_bytes(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    cpu_decode.main([*TINY, "--seconds", "0.01", "--rounds", "1", "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    rows = {r["name"]: r for r in results["rows"]}
    assert {"4-bit fp32", "dense fp32", "dense bf16"} <= set(rows)
    weights = random_weights(llama_1b(small=True))
    assert rows["4-bit fp32"]["bytes"] == total_bytes(quantized(weights, 4))
    assert rows["4-bit fp32"]["error"] < 1e-4
    assert all(r["tokens/s"] > 0 and r["first token, 12"] > 0 for r in rows.values())
    if gguf_file.available() is None:
        theirs = rows["llama.cpp Q4_0 (Q6_K embedding)"]
        assert theirs["bytes"] == pytest.approx(rows["4-bit fp32"]["bytes"], rel=0.01)
        assert results["verdict"]


def test_a_model_with_a_wrong_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchRunner.__init__

    def wrong(self: TorchRunner, name: str, *rest: Any) -> None:
        right(self, name, *rest)
        if name.startswith("4-bit"):
            layer = self.model.model.layers[1].mlp.down_proj
            layer.weight = torch.nn.Parameter(layer.weight.dequantize() * 1.1, requires_grad=False)

    monkeypatch.setattr(TorchRunner, "__init__", wrong)
    with pytest.raises(WrongAnswer, match="4-bit fp32: logits off"):
        cpu_decode.main([*TINY, "--seconds", "0.01"])


def test_rewinding_gives_the_same_logits_again() -> None:
    config = llama_1b(small=True)
    runner = TorchRunner("", config, random_weights(config), torch.float32, 16, False)
    runner.prefill([5, 6, 7])
    first = runner.step(8).clone()
    runner.step(9)
    runner.rewind(3)
    assert torch.equal(runner.step(8), first)


def test_names_of_every_weight_in_gguf() -> None:
    names = {gguf_file.gguf_name(name) for name in random_weights(llama_1b(small=True))}
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    layers = {f"blk.{i}.{part}.weight" for i in range(2) for part in parts}
    assert names == layers | {"token_embd.weight", "output_norm.weight"}
    assert gguf_file.gguf_name(EMBEDDING) == "token_embd.weight"


def test_the_verdict_compares_equal_widths() -> None:
    rows = [{"name": n, "tokens/s": t} for n, t in (("4-bit bf16", 50), ("8-bit bf16", 20), ("llama.cpp Q4_0", 40))]
    (line,) = cpu_decode.verdict(rows)
    assert line["pass"] and "1.25 x" in line["measured"] and "4-bit bf16" in line["aim"]
