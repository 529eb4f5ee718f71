"""Weights as FSDP and DDP take them apart: zeros of another length, flat ones, shards that were filled up."""

import pytest
import torch

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.tensor.rows import padded_rows

CONFIGS = [HqqConfig(4, 32), HqqConfig(3, 32, axis=0), HqqConfig(4, 32, quant_scale=True, quant_zero=True)]


def quantized(config: HqqConfig, rows: int = 100) -> HQQTensor:
    return HQQTensor.from_hp(torch.randn(rows, 128, generator=torch.Generator().manual_seed(0)), config)


@pytest.mark.parametrize("config", CONFIGS)
def test_new_zeros_are_zeros_of_any_number_of_rows(config: HqqConfig) -> None:
    w = quantized(config)
    for rows in (0, 1, 100, 130):
        zeros = w.new_zeros(rows, 128)
        assert type(zeros) is HQQTensor and torch.equal(zeros.dequantize(), torch.zeros(rows, 128))
    assert w.new_zeros((5, 128), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match=r"first dimension only.*got \[100, 64\]"):
        w.new_zeros(100, 64)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_shard_tells_the_rows_that_it_was_filled_up_to(config: HqqConfig) -> None:
    w = quantized(config)
    padded = w.new_zeros(30, 128)
    shard = padded.narrow(0, 0, 25)
    shard.copy_(w[75:])
    assert padded_rows(shard) == padded_rows(shard.detach()) == padded_rows(shard.to("meta")) == 30
    assert torch.equal(shard.dequantize(), w.dequantize()[75:])
    assert padded_rows(w[50:75]) == 25 and padded_rows(w) == 100


def test_flat_weights_come_apart_again_and_refuse_the_rest() -> None:
    a, b, dense = quantized(CONFIGS[0]), quantized(CONFIGS[1], 60), torch.arange(10.0)
    flat = torch.cat([a.view(-1), dense, b.view(-1)])
    assert flat.shape == (160 * 128 + 10,)
    assert torch.equal(flat[: 100 * 128].view(100, 128), a)
    assert torch.equal(flat[100 * 128 : 100 * 128 + 10].view(2, 5), dense.view(2, 5))
    assert torch.equal(flat.narrow(0, 100 * 128 + 10, 60 * 128).view_as(b), b)
    for wrong in (lambda: flat[5:], lambda: flat.view(10, -1), lambda: flat + 1):
        with pytest.raises(NotImplementedError, match="quantized weights"):
            wrong()


def test_zeros_are_put_behind_rows_where_these_have_scales_of_their_own() -> None:
    w = quantized(CONFIGS[0])
    padded = torch.nn.functional.pad(w, [0, 0, 0, 4])
    assert torch.equal(padded.dequantize(), torch.nn.functional.pad(w.dequantize(), [0, 0, 0, 4]))
    for pad, each in (([0, 1], w), ([0, 0, 1, 0], w), ([0, 0, 0, 4], quantized(CONFIGS[1]))):
        with pytest.raises(NotImplementedError, match="use a number of processes that divides"):
            torch.nn.functional.pad(each, pad)
