import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from hqqtensor import (
    check_quantization_status,
    collect_quantization_debug_info,
    hqq_weight_only,
    monitor_quantization_performance,
    quantize_,
)
from hqqtensor.diagnostics.language import compare_language_models


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64, bias=False), nn.Embedding(10, 64))


def test_status_lists_what_is_quantized_and_what_is_not() -> None:
    m = model()
    quantize_(m, hqq_weight_only(4, 64, dynamic_config={"1": {"nbits": 3}}))
    status = check_quantization_status(m)
    assert list(status.quantized) == ["0", "1"] and status.dense == {"2": [10, 64]} and status.bits == {3: 1, 4: 1}
    assert status.size.quantized_nbytes == 64 * 128 // 2 + 64 * 2 * 4 + 64 * 64 * 3 // 8 + 64 * 4
    assert_expected_inline(
        str(status),
        """\
weights                                                              modules
4-bit int, group_size=64, axis=1, scale=float16, zero_point=float16        1
3-bit int, group_size=64, axis=1, scale=float16, zero_point=float16        1
dense                                                                      1
12,992 parameters, 94.6% of them quantized; 0.05 MB dense, 0.01 MB now
4.167 bits a quantized weight, metadata counted
left dense: 2""",
    )


def test_status_of_a_dense_model_has_no_bits() -> None:
    text = str(check_quantization_status(model()))
    assert "left dense: 0, 1, 2" in text and "bits a quantized weight" not in text


def test_performance_counts_bytes_and_times_both_models() -> None:
    m = model()[:2]
    before = sum(p.numel() * 4 for p in m.parameters())
    quantize_(m, hqq_weight_only(4, 64))
    m.train()
    result = monitor_quantization_performance(m, torch.randn(5, 128), runs=2)
    assert result.bytes_before == before and result.bytes_after == sum(p.nbytes for p in m.parameters())
    assert result.bytes_saved == result.bytes_before - result.bytes_after > 0
    assert result.rate_before > 0 and result.rate_after > 0 and result.unit == "samples"
    assert m.training and "samples a second" in str(result)


class Head(nn.Module):
    """A language model of two layers, one of which the user holds in eval mode; ``calls`` has the modes seen."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.table, self.head, self.fail_at = nn.Embedding(8, 64), nn.Linear(64, 8), fail_at
        self.calls: list[list[bool]] = []
        self.train()
        self.head.eval()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.calls.append(self.modes())
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        return SimpleNamespace(logits=self.head(self.table(input_ids)))

    def modes(self) -> list[bool]:
        return [module.training for module in self.modules()]


@pytest.mark.parametrize("fail_at", [None, 1])
@pytest.mark.parametrize("diagnostic", [compare_language_models, monitor_quantization_performance])
def test_every_module_gets_its_own_mode_back(diagnostic, fail_at) -> None:
    m, original, ids = Head(fail_at), Head(), torch.randint(0, 8, (2, 7))
    modes = m.modes()
    assert True in modes and False in modes
    with pytest.raises(KeyboardInterrupt) if fail_at else contextlib.nullcontext():
        if diagnostic is compare_language_models:
            compare_language_models(original, m, ids)
        else:
            monitor_quantization_performance(m, ids, original)
    assert m.modes() == original.modes() == modes
    assert m.calls and not any(any(call) for call in m.calls + original.calls)


def test_performance_counts_tokens_of_integer_inputs() -> None:
    seen = []

    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(8, 64), nn.Linear(64, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids.shape)
            return self.head(self.table(input_ids))

    m = Ids()
    original = copy.deepcopy(m)
    quantize_(m, hqq_weight_only(4, 64))
    ids = torch.randint(0, 8, (2, 7))
    assert monitor_quantization_performance(m, {"input_ids": ids}, original, runs=3).unit == "tokens"
    assert len(seen) == 8  # one pair to warm up, three timed


@pytest.mark.parametrize("bad", [(), {"a": 1}, 3])
def test_performance_needs_a_tensor(bad: object) -> None:
    with pytest.raises(ValueError, match="tensor"):
        monitor_quantization_performance(model(), bad)


def test_debug_info_has_settings_and_error_of_each_module() -> None:
    m = model()
    original = copy.deepcopy(m)
    quantize_(m, hqq_weight_only(2, 32, skip_modules=["1"]))
    (info,) = collect_quantization_debug_info(m, original).modules
    assert (info.name, info.shape, info.nbits, info.group_size, info.axis) == ("0", [64, 128], 2, 32, 1)
    assert info.bits_per_weight == 3.0
    difference = m[0].weight.dequantize() - original[0].weight
    want = (difference.square().sum() / original[0].weight.square().sum()).item()
    assert info.relative_error == pytest.approx(want, rel=1e-5)
    assert 0.1 < info.saturated < 1 and 0 < info.scale_range[0] <= info.scale_range[1]
    assert "64x128" in str(collect_quantization_debug_info(m))
    assert collect_quantization_debug_info(m).modules[0].relative_error is None
    assert str(collect_quantization_debug_info(model())) == "no quantized weights"


def test_debug_info_names_what_the_original_lacks() -> None:
    m = model()
    quantize_(m, hqq_weight_only(4, 64))
    with pytest.raises(KeyError, match=r"1\.weight"):
        collect_quantization_debug_info(m, nn.Sequential(nn.Linear(128, 64)))
