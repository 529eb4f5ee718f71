"""What vLLM's layers run: products of several weights, embeddings and experts, without vLLM."""

import pytest
import torch
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.integrations.vllm.parts import DensePart, PackedPart, Parts, routed
from hqqtensor.integrations.vllm.slices import cut_columns

PLAIN = HqqConfig(4, 32)


def weight(config: HqqConfig, *shape: int, seed: int = 0) -> HQQTensor:
    torch.manual_seed(seed)
    return HQQTensor.from_hp(torch.randn(shape) / 8, config)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("configs", "runs"),
    [
        ([PLAIN, PLAIN, PLAIN], [3]),
        ([PLAIN, HqqConfig(3, 32), HqqConfig(3, 32)], [1, 2]),
        ([HqqConfig(4), HqqConfig(4)], [2]),
        ([HqqConfig(2, 16, quant_scale=True, quant_zero=True, meta_nbits=4)] * 2, [2]),
        ([HqqConfig(2, 32, format="codebook")] * 2, [1, 1]),
        ([HqqConfig(4, 32, rotation=True), PLAIN], [1, 1]),
        ([None, PLAIN], [1, 1]),
    ],
)
def test_joined_layers_keep_settings_of_their_own(configs: list[HqqConfig | None], runs: list[int]) -> None:
    weights = [
        torch.randn(24 * (i + 1), 128) if c is None else weight(c, 24 * (i + 1), 128) for i, c in enumerate(configs)
    ]
    layer = Parts([DensePart(w) if not isinstance(w, HQQTensor) else PackedPart(w) for w in weights])
    assert [len(run) for run in layer.runs] == runs
    dense = torch.cat([w.dequantize() if isinstance(w, HQQTensor) else w for w in weights])
    bias = torch.randn(len(dense))
    for x in (torch.randn(1, 128), torch.randn(5, 128)):
        near(layer(x, None), x @ dense.t())
        near(layer(x, bias), x @ dense.t() + bias)


@pytest.mark.parametrize("config", [PLAIN, HqqConfig(4), HqqConfig(4, 32, rotation=True), HqqConfig(3, 24, axis=0)])
def test_parts_of_the_columns_add_up(config: HqqConfig) -> None:
    whole, x = weight(config, 40, 192), torch.randn(3, 192)
    out = torch.zeros(3, 40)
    for start, end in ((0, 76), (76, 192)):
        out += PackedPart(*cut_columns(whole, start, end))(x[:, start:end], None)
    near(out, x @ whole.dequantize().t())


@pytest.mark.parametrize("config", [HqqConfig(8), HqqConfig(4), HqqConfig(4, 32, rotation=True)])
def test_rows_are_looked_up_in_the_models_dtype(config: HqqConfig) -> None:
    table = weight(config, 50, 64)
    ids = torch.tensor([[3, 0], [49, 3]])
    out = PackedPart(table).embedding(ids, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), table.dequantize()[ids], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("split", [False, True])
def test_experts_add_up_and_those_of_other_processes_add_nothing(split: bool) -> None:
    torch.manual_seed(1)
    gate_up, down = weight(PLAIN, 4, 64, 96), weight(HqqConfig(3, 32), 4, 96, 32, seed=2)
    x, scores = torch.randn(7, 96), torch.rand(7, 2)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(7)])  # 4 stands for an expert that is elsewhere
    pieces = [gate_up[:, :32], gate_up[:, 32:]] if split else [gate_up]

    def activate(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    got = routed(x, scores, experts, [PackedPart(p) for p in pieces], PackedPart(down), activate)
    want = torch.zeros_like(x)
    for token in range(7):
        for score, expert in zip(scores[token], experts[token], strict=True):
            if expert < 4:
                hidden = activate(x[token] @ gate_up.dequantize()[expert].t())
                want[token] += score * (hidden @ down.dequantize()[expert].t())
    near(got, want)


def test_a_part_compiles_as_plain_tensors() -> None:
    layer = Parts(
        [PackedPart(weight(HqqConfig(4), 24, 80)), PackedPart(weight(PLAIN, 24, 80)), DensePart(torch.ones(8, 80))]
    )
    x = torch.randn(3, 80)
    near(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, None), layer(x, None))
