"""The backend without a device: it loads cheaply, says why it cannot run, and its route traces on fake tensors."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqtensor.kernels.triton as kernels
from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.ops import linear, set_backend
from hqqtensor.ops.backend import _BACKENDS, describe_backends, kernel

NO_DEVICE = not (torch.cuda.is_available() or torch.xpu.is_available())


def run(code: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_importing_the_backend_loads_neither_triton_nor_a_device() -> None:
    code = (
        "import sys, torch, torchao; before = set(sys.modules)\n"
        "import hqqtensor, hqqtensor.kernels.triton\n"
        "new = set(sys.modules) - before\n"
        "print(any(n == 'triton' or n.startswith('triton.') for n in new), torch.cuda.is_initialized())"
    )
    assert run(code, TRITON_INTERPRET="0").split() == ["False", "False"]


def test_it_is_registered_for_gpus_and_says_why_it_cannot_run() -> None:
    status = {b.name: b for b in describe_backends()}["triton"]
    assert status.device_types == ("cuda", "xpu")
    if NO_DEVICE:
        assert status.reason in ("there is no CUDA, HIP or XPU device", "triton is not installed (pip install triton)")
        with pytest.raises(RuntimeError, match="triton"):
            set_backend("triton")


def test_on_a_gpu_every_operator_goes_to_triton(monkeypatch) -> None:
    monkeypatch.setitem(_BACKENDS, "triton", replace(_BACKENDS["triton"], why_unavailable=lambda: None))
    ours = _BACKENDS["triton"].kernels
    for op in kernels.OPERATORS:
        assert kernel(op, "cuda") is ours[op] and kernel(op, "xpu") is ours[op]
        assert kernel(op, "meta") is not ours[op]


def test_the_registrys_operators_are_those_of_the_schemas() -> None:
    from hqqtensor.ops.definitions import SCHEMAS

    assert set(kernels.OPERATORS) == set(SCHEMAS)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_cuda_route_traces_whole_on_fake_tensors(axis: int) -> None:
    layer = torch.nn.Linear(256, 64, bias=True)
    quantized = HQQTensor.from_hp(layer.weight, HqqConfig(3, 64, axis=axis))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with FakeTensorMode(allow_non_fake_inputs=False):
        names = ("qdata", "scale", "zero_point")
        data = {
            n: torch.empty(getattr(quantized, n).shape, dtype=getattr(quantized, n).dtype, device="cuda") for n in names
        }
        x = torch.empty(2, 5, 256, device="cuda", dtype=torch.bfloat16)
        bias = torch.empty(64, device="cuda", dtype=torch.bfloat16)

        def step(x, qdata, scale, zero_point, bias):
            y = linear(x, qdata, scale, zero_point, bias, None, [], 3, "int", 64, axis, 256, "float")
            return torch.relu(y) * 2

        compiled = torch.compile(step, fullgraph=True, backend=keep)
        y = compiled(x, data["qdata"], data["scale"], data["zero_point"], bias)
    assert y.shape == (2, 5, 64) and y.device.type == "cuda" and y.dtype == torch.bfloat16
    assert len(graphs) == 1
    assert any("hqqtensor.linear" in str(node.target) for node in graphs[0].graph.nodes)


def test_make_fx_traces_every_operator_for_cuda() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    ops = torch.ops.hqqtensor
    settings = ([], 4, "int", 64, 1, 256)
    with FakeTensorMode():
        q = torch.empty(3, 96, 128, dtype=torch.uint8, device="cuda")
        scale = torch.empty(3, 96, 4, dtype=torch.float16, device="cuda")
        q2 = torch.empty(96, 128, dtype=torch.uint8, device="cuda")
        scale2 = torch.empty(96, 4, dtype=torch.float16, device="cuda")
        x = torch.empty(3, 2, 256, dtype=torch.float16, device="cuda")
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        tokens = torch.empty(7, dtype=torch.int64, device="cuda")

        def step(x, q, scale, zero, q2, scale2, ends, tokens):
            a = ops.batched_linear(x, q, scale, zero, None, *settings, "float")
            b = ops.grouped_linear(torch.flatten(x, 0, 1), ends, q, scale, zero, None, *settings, "float")
            c = ops.embedding(tokens, q2, scale2, scale2, *settings, torch.float16)
            d = ops.dequantize(q, scale, zero, *settings, torch.bfloat16)
            return a, b, c, d

        graph = make_fx(step)(x, q, scale, scale, q2, scale2, ends, tokens)
        shapes = [tuple(t.shape) for t in step(x, q, scale, scale, q2, scale2, ends, tokens)]
    assert shapes == [(3, 2, 96), (6, 96), (7, 256), (3, 96, 256)]
    found = {str(node.target).split(".")[1] for node in graph.graph.nodes if "hqqtensor" in str(node.target)}
    assert found == {"batched_linear", "grouped_linear", "embedding", "dequantize"}
