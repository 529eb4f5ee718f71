"""Exported and compiled graphs: one operator for each product, and AOTInductor runs them without Python's registry."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.kernels import cpu

compiled = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


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


@compiled
@pytest.mark.slow
def test_aotinductor_runs_a_model_with_plain_and_quantized_scales(tmp_path: Path) -> None:
    """torch's executor hands an empty list of tensors over as None, which the schemas must allow."""
    m, x = model(dynamic_config={"2": {"quant_scale": True, "quant_zero": True}}), torch.randn(3, 64)
    assert [bool(layer.weight.operand().meta) for layer in (m[0], m[2])] == [False, True]
    with torch.no_grad():
        exported = torch.export.export(m, (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), m(x))
