"""Compiled graphs: products of one input are joined, with the results that they had apart."""

import pytest
import torch
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.compile import LINEAR_MANY, JoinLinears


class Heads(nn.Module):
    """Three layers of one input, the last with settings of its own; rows of different number."""

    def __init__(self, bias: bool, configs: tuple[HqqConfig, HqqConfig, HqqConfig]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, n, bias=bias) for n in (64, 24, 40))
        for layer, config in zip(self.layers, configs, strict=True):
            layer.weight = nn.Parameter(HQQTensor.from_hp(layer.weight.detach(), config), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class Counted(JoinLinears):
    """Remembers how many weights each joined product has."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        self.joined = [len(n.args[1]) for n in graph.find_nodes(op="call_function", target=LINEAR_MANY)]

    def uuid(self) -> None:
        """Graphs are compiled anew."""


def joined(model: nn.Module, x: Tensor) -> list[int]:
    """How many weights each joined product of the compiled model has, whose results must be the eager ones."""
    torch._dynamo.reset()
    join = Counted()
    with torch.no_grad():
        outputs = torch.compile(model, options={"post_grad_custom_pre_pass": join})(x)
        for got, want in zip(outputs, model(x), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)
    return join.joined


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 3, 128)])
def test_layers_of_one_input_and_the_same_settings_become_one_product(bias: bool, shape: tuple[int, ...]) -> None:
    alike = HqqConfig(4, 64)
    assert joined(Heads(bias, (alike, alike, HqqConfig(4, 32))), torch.randn(shape)) == [2]
    assert joined(Heads(bias, (alike, alike, alike)), torch.randn(shape)) == [3]
    assert joined(Heads(bias, (HqqConfig(4), HqqConfig(4), alike)), torch.randn(shape)) == [2]
    scaled = HqqConfig(4, 64, quant_scale=True)
    assert joined(Heads(bias, (alike, scaled, scaled)), torch.randn(shape)) == [2]


def test_layers_that_one_product_cannot_serve_are_left_alone() -> None:
    codebook = HqqConfig(4, 64, format="codebook")
    assert joined(Heads(False, (codebook,) * 3), torch.randn(1, 128)) == []
