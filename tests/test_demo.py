"""The figures that the project promises, on its two real models."""

import pytest

from hqqtensor import demo


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
    assert m.error < 0.01 and m.bits_per_weight == 4.5
    sentences = demo.held_out_lines(32)
    before, after = demo.embed(original, tokenizer, sentences), demo.embed(m.model, tokenizer, sentences)
    assert 0.93 < (before * after).sum(-1).mean() < 1
    assert demo.same_neighbour(before, before) == 1
    best = demo._nearest(original, tokenizer)
    assert best.startswith("Compressing parameters")


def test_demo_says_where_its_model_should_be(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(demo, "DOCLM", tmp_path / "gone")
    assert demo.main() == 1
    assert "gone" in capsys.readouterr().err
