from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import ours
from benchmarks.quality.method import affine_bits
from benchmarks.quality.peers.gptq_paper import _solve, blocks_of
from benchmarks.quality.peers.nf4_paper import NF4, _quantize
from benchmarks.quality.report import front
from benchmarks.quality.statistics import mean_interval, ratio_interval
from benchmarks.quality.task import nearest


def result(name: str, bits: float, value: float, data: str = "") -> dict:
    return {"task": "doclm", "method": name, "bits": bits, "data": data, "windows": {"kl": [value]}}


def test_front_leaves_out_what_is_worse_at_equal_or_more_bits():
    some = [result("a", 4.5, 1.0), result("b", 4.5, 2.0), result("c", 3.0, 3.0), result("d", 5.0, 1.5)]
    assert front(some, "doclm") == {"a", "c"}


def test_more_data_does_not_push_out_methods_with_less():
    some = [result("weights", 4.5, 1.0), result("model", 4.5, 0.7, "model"), result("text", 4.5, 0.5, "text")]
    assert front(some, "doclm") == {"weights", "model", "text"}


def test_less_data_pushes_out_methods_with_more():
    some = [result("weights", 4.5, 1.0), result("model", 4.6, 1.1, "model"), result("text", 4.7, 1.2, "text")]
    assert front(some, "doclm") == {"weights"}
    some = [result("model", 4.5, 0.7, "model"), result("text", 4.6, 0.8, "text"), result("weights", 4.6, 0.9)]
    assert front(some, "doclm") == {"model", "weights"}


def test_intervals_hold_the_mean_and_pairs_cancel_common_noise():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    mean, low, high = mean_interval(values)
    assert low < mean < high and high - low < 0.2
    assert ratio_interval([v / 2 for v in values], values) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="same windows"):
        ratio_interval(values, values[1:])


def test_bits_count_ragged_groups():
    assert affine_bits(torch.zeros(10, 100), 3, 64) == 10 * (300 + 2 * 32)


def test_nf4_keeps_its_own_levels():
    w = NF4.repeat(2, 4)
    got = _quantize(w, 64)
    torch.testing.assert_close(got.weight, w)
    assert got.bits / w.numel() == 4.25


def test_gptq_beats_rounding_where_inputs_are_correlated():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    moments = x.T @ x / 256
    w = torch.randn(16, 64, generator=generator)
    errors = [_solve(w, h, 4, 64) - w for h in (moments, torch.eye(64))]
    feedback, plain = (((e @ moments) * e).sum() for e in errors)
    assert feedback < 0.1 * plain


def test_layers_fall_into_their_blocks():
    names = ["m.layers.0.q", "m.layers.0.mlp.up", "m.layers.1.q"]
    assert blocks_of(names) == [names[:2], names[2:]]


def test_nearest_leaves_out_the_sentence_itself():
    e = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), dim=-1)
    assert nearest(e, 1).flatten().tolist() == [1, 0, 1]


def test_mixed_text_is_half_the_models_own_a_quarter_news_and_a_quarter_documentation(monkeypatch):
    def windows(kind: int, count: int) -> torch.Tensor:
        return torch.full((count, 512), kind)

    kinds = {"news": 2, "documentation": 3}
    monkeypatch.setattr(ours.texts, "news", lambda _cache: "news")
    monkeypatch.setattr(ours.texts, "documentation", lambda: "documentation")
    monkeypatch.setattr(ours, "smollm_windows", lambda text, count: windows(kinds[text], count))
    monkeypatch.setattr(ours, "_written", lambda _task, seed: [{"input_ids": windows(10 + seed, 16)}])
    task = SimpleNamespace(name="SmolLM2", context=512)
    ids = torch.cat([batch["input_ids"] for batch in ours.batches(task, str(24576))])
    kind, count = ids[:, 0].unique(return_counts=True)
    assert dict(zip(kind.tolist(), count.tolist(), strict=True)) == {10: 16, 11: 8, 2: 12, 3: 12}


def test_methods_that_need_a_model_that_writes_are_not_for_minilm():
    models = {method.name: method.models for method in ours.methods()}
    assert models["hqqtensor 3-bit default, own text"] == ("SmolLM2", "doclm")
    assert models["hqqtensor 3-bit default, 16k mixed tokens"] == ("SmolLM2",)
    assert models["hqqtensor 3-bit default"] == ()
