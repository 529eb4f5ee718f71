"""Functions that need a weight's numbers name themselves and say to dequantize first."""

import importlib.util
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtensor import HqqConfig, HQQTensor, dequantize_, quantize_

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "torch.Tensor.add": lambda w: w + 1,
    "torch.Tensor.__rsub__": lambda w: 1 - w,
    "torch.Tensor.mul": lambda w: torch.ones(8, 64) * w,
    "torch.Tensor.norm": lambda w: w.norm(),
    "torch.Tensor.__eq__": lambda w: w == w,
    "torch.Tensor.add_": lambda w: w.add_(1),
    "torch.Tensor.numpy": lambda w: w.numpy(),
    "torch.Tensor.tolist": lambda w: w.tolist(),
    "torch.Tensor.__array__": lambda w: np.asarray(w),
    "torch.Tensor.flip": lambda w: w.flip(0),
    "torch.Tensor.unbind": lambda w: list(w),
    "torch.sum": lambda w: torch.sum(w),
    "torch.mean": lambda w: torch.mean(input=w, dim=0),
    "torch.stack": lambda w: torch.stack([torch.ones(8, 64), w]),
    "torch.linalg.svd": lambda w: torch.linalg.svd(w),
    "torch.nn.functional.softmax": lambda w: F.softmax(w, -1),
    "torch.nn.functional.mse_loss": lambda w: F.mse_loss(torch.zeros(8, 64), w),
    "torch.nn.init.normal_": lambda w: nn.init.normal_(w),
}


@pytest.fixture
def weight() -> HQQTensor:
    torch.manual_seed(0)
    return HQQTensor.from_hp(torch.randn(8, 64), HqqConfig(4, 32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_is_not_offered_names_itself_the_weight_and_what_to_do(name: str, weight: HQQTensor) -> None:
    before = weight.clone()
    with pytest.raises(NotImplementedError) as caught:
        FUNCTIONS[name](weight)
    text = str(caught.value)
    assert text.startswith(f"{name} is not offered for a quantized weight: call dequantize() on it first, or ")
    assert "hqqtensor.dequantize_(model)" in text and text.endswith(f"The weight is {weight!r}")
    assert torch.equal(weight, before)
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker process hands it on
    assert type(again) is type(caught.value) and str(again) == text


def test_the_same_functions_take_the_dequantized_weight(weight: HQQTensor) -> None:
    for function in FUNCTIONS.values():
        function(weight.dequantize())


def test_compiled_code_says_the_same(weight: HQQTensor) -> None:
    with pytest.raises(Exception, match=r"torch\.Tensor\.sum is not offered for a quantized weight"):
        torch.compile(lambda x: x + weight.sum(), backend="eager", fullgraph=True)(torch.ones(2))


# torch.func.vmap


@pytest.fixture
def stack() -> HQQTensor:
    return HQQTensor.from_hp(torch.randn(3, 8, 64), HqqConfig(4, 32))


@pytest.mark.parametrize("bias", [None, torch.randn(8)])
@pytest.mark.parametrize("dim", [0, 1])
def test_activations_are_mapped_over_one_weight(dim: int, bias: Tensor | None, weight: HQQTensor) -> None:
    x = torch.randn(5, 2, 64, requires_grad=True)
    want = F.linear(x, weight, bias)
    got = torch.func.vmap(F.linear, in_dims=(dim, None, None), out_dims=dim)(x, weight, bias)
    assert torch.equal(got, want)
    assert torch.equal(torch.func.vmap(torch.func.vmap(lambda x: F.linear(x, weight, bias)))(x), want)
    assert torch.allclose(torch.func.vmap(lambda x: x @ weight.t())(x), F.linear(x, weight))
    got.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.dequantize().sum(0).expand(5, 2, 64), atol=1e-5)


def test_biases_and_indices_are_mapped_over_one_weight(weight: HQQTensor) -> None:
    x, bias = torch.randn(5, 2, 64), torch.randn(5, 8)
    want = F.linear(x, weight) + bias[:, None]
    assert torch.allclose(torch.func.vmap(lambda x, b: F.linear(x, weight, b))(x, bias), want, atol=1e-5)
    want = F.linear(x[0], weight) + bias[:, None]
    assert torch.allclose(torch.func.vmap(lambda b: F.linear(x[0], weight, b))(bias), want, atol=1e-5)
    indices = torch.tensor([[1, 2], [3, 0]])
    assert torch.equal(torch.func.vmap(lambda i: F.embedding(i, weight))(indices), F.embedding(indices, weight))


def test_mapping_over_a_weight_says_to_dequantize(weight: HQQTensor, stack: HQQTensor) -> None:
    x = torch.randn(2, 64)
    for function in (lambda w: F.linear(x, w), lambda w: w * 2, lambda w: w.sum()):
        with pytest.raises(NotImplementedError, match=r"call dequantize\(\) on it first, .* torch\.func"):
            torch.func.vmap(function)(stack)
        torch.func.vmap(function)(stack.dequantize())


def test_mapping_over_experts_says_to_dequantize(stack: HQQTensor) -> None:
    x = torch.randn(4, 3, 2, 64)
    with pytest.raises(NotImplementedError, match=r"vmap of hqqtensor::batched_linear is not offered.*dequantize"):
        torch.func.vmap(lambda x: torch.bmm(x, stack.transpose(1, 2)))(x)
    assert torch.func.vmap(lambda x: torch.bmm(x, stack.dequantize().transpose(1, 2)))(x).shape == (4, 3, 2, 8)


# torch.onnx.export


@pytest.mark.parametrize("dynamo", [True, False])
def test_exporting_to_onnx_says_to_dequantize(dynamo: bool) -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64)
    quantize_(model, HqqConfig(4, 32))
    text = r"torch\.onnx\.export: 1\.weight is quantized, .* call hqqtensor\.dequantize_\(model\) first"
    with pytest.raises(NotImplementedError, match=text):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)
    with pytest.raises(NotImplementedError, match=text):
        torch.onnx.export(model=model, args=(x,), f=io.BytesIO(), dynamo=dynamo)
    program = torch.export.export(model, (x,))
    with pytest.raises(NotImplementedError, match=r"the program calls hqqtensor\.linear\.default, .* first"):
        torch.onnx.export(program, dynamo=True)
    dequantize_(model)
    try:
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)
    except (ModuleNotFoundError, torch.onnx.OnnxExporterError) as error:  # packages of torch's exporters are missing
        assert "onnx" in str(error) and importlib.util.find_spec("onnx" if not dynamo else "onnxscript") is None
