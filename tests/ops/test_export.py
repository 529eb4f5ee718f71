"""Exported and compiled graphs: one operator for each product. Packages of AOTInductor: tests/export."""

import pytest
import torch
from torch import Tensor, nn

from hqqtensor import HqqConfig, quantize_


def model(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    return quantize_(layers, HqqConfig(**{"nbits": 4, "group_size": 32, **settings})) or layers  # type: ignore[arg-type]


def operators(graph: torch.fx.Graph) -> list[str]:
    found = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name for name in found if name.startswith("hqqtensor.")]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_product_is_the_public_operator(strict: bool) -> None:
    m, x = model(), torch.randn(3, 64)
    with torch.no_grad():
        exported = torch.export.export(m, (x,), strict=strict)
    assert operators(exported.graph) == ["hqqtensor.linear.default"] * 2
    torch.testing.assert_close(exported.module()(x), m(x))


def test_a_compiled_product_is_one_operator() -> None:
    m, x, seen = model(), torch.randn(3, 64), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(operators(graph.graph))
        return graph

    torch._dynamo.reset()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(m, backend=backend, fullgraph=True)(x), m(x))
    assert seen == ["hqqtensor._linear.default"] * 2


@pytest.mark.parametrize("choice", ["eager", "aot_eager"])
def test_float32_precision_holds_in_compiled_graphs_and_is_fixed_in_exported_ones(choice: str) -> None:
    m, x, before = model(), torch.randn(3, 64), torch.get_float32_matmul_precision()
    torch._dynamo.reset()
    step = torch.compile(m, backend=choice)
    try:
        with torch.no_grad():
            exact, exported = m(x), torch.export.export(m, (x,))
            assert torch.equal(step(x), exact)
            torch.set_float32_matmul_precision("high")
            rounded = m(x)
            assert not torch.equal(rounded, exact)
            assert torch.equal(step(x), rounded)  # torch compiles again
            assert torch.equal(exported.module()(x), exact)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("strict", [False, True])
def test_batch_and_length_may_be_dynamic(strict: bool) -> None:
    m, dim = model(dynamic_config={"2": {"quant_scale": True, "quant_zero": True}}), torch.export.Dim
    shapes = ({0: dim("batch", min=1, max=64), 1: dim("length", min=1, max=512)},)
    with torch.no_grad():
        exported = torch.export.export(m, (torch.randn(3, 5, 64),), dynamic_shapes=shapes, strict=strict).module()
        for batch, length in ((1, 1), (2, 40), (64, 1)):
            x = torch.randn(batch, length, 64)
            assert torch.equal(exported(x), m(x))
