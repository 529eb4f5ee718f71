"""monitor_quantization_performance as a context: what a model does while it is used."""

import json
import threading
import urllib.request

import pytest
import torch
import transformers
from torch import nn

import hqqtensor
from hqqtensor import HqqConfig, backend, hqq_weight_only, monitor_quantization_performance, ops, quantize_
from hqqtensor.diagnostics.usage import UsagePerformance
from hqqtensor.kernels import cpu

BANDWIDTH = 1e10


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64)).eval()
    quantize_(model, hqq_weight_only(4, 64))
    return model


def language_model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_(model, HqqConfig(4, embedding_nbits=8))
    return model


def test_passes_and_products_are_counted_with_the_bytes_that_they_read() -> None:
    model = small()
    real = ops.linear
    model(torch.randn(3, 128))  # not watched
    with torch.no_grad(), monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH) as monitor:
        for _ in range(4):
            model(torch.randn(3, 128))
    model(torch.randn(3, 128))
    assert ops.linear is real and not model._forward_hooks and not model._forward_pre_hooks
    report = monitor.report()
    passes = report.passes["samples"]
    assert (passes.count, passes.tokens) == (4, 12) and 0 < passes.p50 <= passes.p99 <= passes.longest
    assert passes.rate == pytest.approx(12 / passes.seconds) and 0 < passes.seconds <= report.seconds
    first, second = report.products
    name = f"cpu ({cpu.instruction_set()})"
    assert (first.op, first.backend, first.rows, first.out_features, first.in_features) == ("linear", name, 4, 64, 128)
    assert (first.nbits, first.group_size, first.calls, second.calls) == (4, 64, 4, 4)
    assert first.nbytes == 4 * model[0].weight.nbytes
    assert report.bytes_read == 4 * sum(m.weight.nbytes for m in model)
    assert report.read_rate == pytest.approx(report.bytes_read / passes.seconds)
    assert report.fallbacks == [] and report.memory_bandwidth == BANDWIDTH
    assert report.most_resident >= report.resident > 1e6 and report.model_bytes > 0


def test_generate_is_split_into_prompt_and_decode() -> None:
    model, ids = language_model(), torch.arange(2, 7)[None]
    with monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH) as monitor:
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    passes = monitor.report().passes
    assert (passes["prompt"].count, passes["prompt"].tokens) == (1, 5)
    assert (passes["decode"].count, passes["decode"].tokens) == (5, 5)
    ops_seen = {product.op: product for product in monitor.report().products}
    assert set(ops_seen) == {"linear", "embedding"}
    lookups = [p for p in monitor.report().products if p.op == "embedding"]
    row = model.model.embed_tokens.weight.nbytes // 256
    assert sum(p.nbytes for p in lookups) == 10 * row


def test_products_within_a_decoder_are_counted_too() -> None:
    model, ids = language_model(), torch.arange(2, 7)[None]
    hqqtensor.prepare_for_generation_(model)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, **options)
    with monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH) as monitor:
        model.generate(ids, **options)
        assert model.model.forward.decoded_calls == 10
    model.generate(ids, **options)  # after the block
    with pytest.raises(RuntimeError, match="one block"), monitor:
        pass
    within = [p for p in monitor.report().products if p.op == "decoder"]
    assert sum(p.calls for p in within) == 5 * 14 and {p.rows for p in within} == {1}
    layers = sum(p.nbytes for p in model.model.layers.parameters() if isinstance(p, hqqtensor.HQQTensor))
    assert sum(p.nbytes for p in within) == 5 * layers
    assert monitor.report().why_no_decoder is None


def test_fallbacks_are_named() -> None:
    model = small()
    with torch.no_grad(), monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH) as monitor:
        with backend("reference"):
            model(torch.randn(1, 128))
        model[0].register_forward_pre_hook(lambda module, _: print(module.weight.dequantize().shape))
        model(torch.randn(1, 128))
    fallbacks = monitor.report().fallbacks
    assert any(text.startswith("linear of 4-bit int g64 [64, 128] by reference, 1 times") for text in fallbacks)
    assert any(text.startswith("dequantize of 4-bit int g64 [64, 128] by cpu") for text in fallbacks)
    assert "fallback: linear of 4-bit" in monitor.table()


def test_table_and_json_have_the_figures() -> None:
    model = small()
    monitor = monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH)
    assert "no forward pass yet" in monitor.table()
    with torch.no_grad(), monitor:
        model(torch.randn(2, 128))
    table = monitor.table()
    assert "samples" in table and "64x128" in table and "of the 10.0 GB/s that this machine reads" in table
    data = json.loads(monitor.to_json())
    assert data["passes"]["samples"]["tokens"] == 2 and data["passes"]["samples"]["rate"] > 0
    assert {p["op"] for p in data["products"]} == {"linear"} and data["fallbacks"] == [] and data["bytes_read"] > 0


def test_threads_are_counted_together_and_monitors_may_overlap() -> None:
    first, second = small(), small()
    with torch.no_grad(), monitor_quantization_performance(first, memory_bandwidth=BANDWIDTH) as outer:
        with monitor_quantization_performance(second, memory_bandwidth=BANDWIDTH) as inner:
            threads = [threading.Thread(target=lambda: first(torch.randn(1, 128))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        first(torch.randn(1, 128))
    assert outer.report().passes["samples"].count == 5 and inner.report().passes == {}
    assert sum(p.calls for p in outer.report().products) == 10 and inner.report().products == []


def test_an_error_in_the_model_ends_the_pass_and_the_block_puts_all_back() -> None:
    model = small()
    real = ops.linear
    with pytest.raises(RuntimeError), monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH):
        model(torch.randn(1, 100))
    assert ops.linear is real and not model._forward_hooks


def test_prometheus_answers_within_the_block() -> None:
    pytest.importorskip("prometheus_client")
    model = small()
    with torch.no_grad(), monitor_quantization_performance(model, memory_bandwidth=BANDWIDTH) as monitor:
        model(torch.randn(2, 128))
        port = monitor.serve_prometheus(0)
        url = f"http://127.0.0.1:{port}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    assert 'hqqtensor_tokens_total{kind="samples"} 2.0' in text
    assert 'hqqtensor_products_total{backend="cpu (' in text and "hqqtensor_resident_bytes" in text
    value = text.split("\nhqqtensor_memory_bandwidth_bytes_per_second ")[1].split()[0]
    assert float(value) == BANDWIDTH
    assert monitor.prometheus_text().count("# TYPE") == text.count("# TYPE")
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=1)
    with pytest.raises(RuntimeError, match="within"):
        monitor.serve_prometheus(0)


def test_without_prometheus_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install 'hqqtensor\[monitor\]'"):
        monitor_quantization_performance(small(), memory_bandwidth=BANDWIDTH).prometheus_text()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        monitor_quantization_performance("model")
    with pytest.raises(ValueError, match="memory_bandwidth"):
        monitor_quantization_performance(small(), memory_bandwidth=0)
    with pytest.raises(ValueError, match="give inputs too"):
        monitor_quantization_performance(small(), original=small())
    assert isinstance(monitor_quantization_performance(small()).report(), UsagePerformance)
