"""Rows and columns that tensor parallelism cuts out of packed weights: the numbers are those of the dense slice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.integrations.vllm.slices import cut_columns, cut_rows, row_ranges

CONFIGS = [
    HqqConfig(4, 64),
    HqqConfig(3),  # groups of 20, quantized scales and zero points, column scales
    HqqConfig(5, 32, quant_scale=True, quant_zero=True, meta_nbits=8),
    HqqConfig(2, 48, axis=0),
    HqqConfig(4, 48, axis=0, quant_scale=True, quant_zero=True, meta_nbits=4),
    HqqConfig(4, 32, format="nf4"),
    HqqConfig(3, 64, format="codebook", codebook="row"),
    HqqConfig(3, 64, format="codebook", codebook="tensor"),
    HqqConfig(4, 64, rotation=True),
    HqqConfig(8, None, view_as_float=True),
]
IDS = [f"{i}-{c.nbits}-{c.group_size}-axis{c.axis}-{c.format}" for i, c in enumerate(CONFIGS)]


def quantized(config: HqqConfig, *shape: int) -> HQQTensor:
    torch.manual_seed(0)
    return HQQTensor.from_hp(torch.randn(shape, dtype=torch.bfloat16), config)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rows_may_be_cut_anywhere(config: HqqConfig) -> None:
    weight = quantized(config, 288, 320)
    dense = weight.dequantize(torch.float32)
    for start, end in ((0, 144), (144, 288), (7, 100), (0, 288)):
        close(cut_rows(weight, start, end).dequantize(torch.float32), dense[start:end])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_columns_are_cut_outward_to_groups(config: HqqConfig) -> None:
    weight = quantized(config, 96, 576)
    dense = weight.dequantize(torch.float32)
    for start, end in ((0, 288), (288, 576), (128, 448), (30, 31)):
        piece, before, after = cut_columns(weight, start, end)
        assert isinstance(piece, HQQTensor) and piece.shape == (96, before + end - start + after)
        first = start - before
        close(piece.dequantize(torch.float32), dense[:, first : first + piece.shape[1]])
        if config.axis == 1 and not config.rotation:
            size = config.group_size or 576
            assert first % size == 0 and before < size and after < size


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_slices_of_experts_are_those_of_each(config: HqqConfig) -> None:
    if config.format == "codebook":
        pytest.skip("codebooks of 3-D weights are shared by all experts or rows; the matrices above cover the cuts")
    weight = quantized(config, 3, 128, 192)
    dense = weight.dequantize(torch.float32)
    close(cut_rows(weight, 64, 128).dequantize(torch.float32), dense[:, 64:128])
    piece, before, after = cut_columns(weight, 96, 192)
    close(piece.dequantize(torch.float32), dense[..., 96 - before : 192 + after])


def test_dense_weights_are_views() -> None:
    weight = torch.randn(6, 8)
    assert torch.equal(cut_rows(weight, 2, 4), weight[2:4])
    piece, before, after = cut_columns(weight, 1, 5)
    assert torch.equal(piece, weight[:, 1:5]) and (before, after) == (0, 0)


def ranges(rows: int, local: list[int], full: Any, ranks: int) -> list[list[tuple[int, int]]]:
    return [row_ranges(rows, local, full, rank, ranks, "qkv_proj") for rank in range(ranks)]


def test_a_layer_is_split_into_equal_rows_or_shared() -> None:
    assert ranges(64, [32], None, 2) == [[(0, 32)], [(32, 64)]]
    assert ranges(64, [64], None, 2) == [[(0, 64)], [(0, 64)]]


def test_few_key_heads_are_shared_by_neighbours() -> None:
    # Two heads of keys over four ranks: ranks 0 and 1 have the first, 2 and 3 the second.
    assert ranges(32, [16], None, 4) == [[(0, 16)], [(0, 16)], [(16, 32)], [(16, 32)]]


def test_joined_weights_in_one_tensor_are_split_one_by_one() -> None:
    assert ranges(128, [64, 64], None, 1) == [[(0, 128)]]
    assert ranges(128, [32, 32], None, 2) == [[(0, 32), (64, 96)], [(32, 64), (96, 128)]]
    assert ranges(96, [32, 16, 16], [64, 16, 16], 2) == [[(0, 32), (64, 96)], [(32, 96)]]


@pytest.mark.parametrize(("rows", "local", "full"), [(65, [32], None), (48, [32], None), (100, [32, 32], None)])
def test_uneven_rows_are_named(rows: int, local: list[int], full: Any) -> None:
    with pytest.raises(ValueError, match=r"^qkv_proj: .*rows"):
        row_ranges(rows, local, full, 0, 2, "qkv_proj")
