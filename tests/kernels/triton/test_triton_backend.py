"""The backend without a device: it loads cheaply, says why it cannot run, and its route traces on fake tensors."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqtensor.kernels.triton as kernels
from hqqtensor.ops import set_backend
from hqqtensor.ops.backend import _BACKENDS, candidates, describe_backends
from hqqtensor.packing import meta_bytes, row_bytes

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
    for op in kernels.OPERATORS:
        assert candidates(op, "cuda")[0].name == candidates(op, "xpu")[0].name == "triton"
        assert "triton" not in [b.name for b in candidates(op, "meta")]


def test_the_registrys_operators_are_those_of_the_schemas() -> None:
    from hqqtensor.ops.definitions import SCHEMAS

    assert set(kernels.OPERATORS) == set(SCHEMAS)


OPS = torch.ops.hqqtensor


def trace(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    """What ``torch.compile(fullgraph=True)`` gives for fake inputs, and which of our operators its one graph holds."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    out = torch.compile(function, fullgraph=True, backend=keep)(*inputs)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    return out, {target.split(".")[1] for target in targets if target.startswith("hqqtensor.")}


@pytest.mark.parametrize(("nbits", "meta"), [(3, 0), (8, 0), (4, 8), (4, 4)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", kernels.OPERATORS)
def test_torch_compile_traces_every_operator_for_cuda_whole(op: str, axis: int, nbits: int, meta: int) -> None:
    """meta: bits of quantized scales and zero points, 0 for plain ones."""
    E, N, K = 3, 64, 256
    lead = (E,) if op in ("batched_linear", "grouped_linear") else ()
    own: list[torch.Tensor] = []
    settings = (own, nbits, "int", 64, axis, K)
    *rows, columns = (*lead, N, K // 64) if axis == 1 else (*lead, N // 64, K)
    steps = {
        "linear": lambda x, q, s, z, i: torch.relu(OPS.linear(x, q, s, z, x.new_zeros(N), None, *settings, "float")),
        "batched_linear": lambda x, q, s, z, i: OPS.batched_linear(x, q, s, z, None, *settings, "float") * 2,
        "grouped_linear": lambda x, q, s, z, i: OPS.grouped_linear(
            x.flatten(0, 1), i, q, s, z, None, *settings, "float"
        ).cos(),
        "embedding": lambda x, q, s, z, i: OPS.embedding(i, q, s, z, *settings, torch.float16) + 1,
        "dequantize": lambda x, q, s, z, i: OPS.dequantize(q, s, z, *settings, torch.float16).mT * 2,
    }
    shapes = {
        "linear": (E, 5, N), "batched_linear": (E, 5, N), "grouped_linear": (5 * E, N), "embedding": (E, K),
        "dequantize": (K, N),
    }  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=False):
        q = torch.empty(*lead, N, row_bytes(K, nbits), dtype=torch.uint8, device="cuda")
        if meta:
            scale = torch.empty(*rows, meta_bytes(columns, meta), dtype=torch.uint8, device="cuda")
            own += [torch.empty(*lead, 1, columns, device="cuda")] * 4
        else:
            scale = torch.empty(*rows, columns, dtype=torch.float16, device="cuda")
        x = torch.empty(E, 5, K, dtype=torch.float16, device="cuda")
        index = torch.empty(E, dtype=torch.int32, device="cuda")
        y, found = trace(steps[op], x, q, scale, scale.clone(), index)
    assert tuple(y.shape) == shapes[op] and y.device.type == "cuda" and y.dtype == torch.float16
    assert found == {op}
