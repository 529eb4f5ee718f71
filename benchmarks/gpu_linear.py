"""Time of one linear layer on a GPU: ``python -m benchmarks.gpu_linear [--report FILE]``.

Ours at every width beside dense float16 and whatever of gemlite, torchao's int4 and Marlin (vLLM) is installed. Before
it is timed, every product of ours is compared with the plain reference on the same device; one out of bounds ends the
run with status 1. Each time is the median of runs over weights that together exceed the cache, so that each is read
from memory.

Not yet run: the project's machine has no GPU.
"""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hqqtensor.ops import PackedWeight
from hqqtensor.packing import pack

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 4, 16, 64, 128, 1024)
GROUP = 64
CACHE = 256 << 20
"""Bytes of weights that one timing walks through: more than any GPU's last-level cache."""

Call = Callable[[Tensor], Tensor]


def median_time(calls: list[Call], x: Tensor) -> float:
    """Seconds of one call; ``calls`` are the same layer with different weights."""
    for call in calls[:3]:
        call(x)
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def graphed(calls: list[Call], x: Tensor) -> list[Call]:
    """The calls as one CUDA graph: without it small layers measure Python."""
    for call in calls:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return x

    return [replay]


def ours(N: int, K: int, nbits: int, copies: int) -> list[Call]:
    from hqqtensor.kernels.triton import launch

    groups = K // GROUP

    def layer(seed: int) -> Call:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**nbits, (N, K), dtype=torch.uint8, generator=generator)
        q = pack(codes, nbits).cuda()
        scale = (torch.rand(N, groups, generator=generator) * 0.01 + 0.01).half().cuda()
        zero = (torch.rand(N, groups, generator=generator) * (2**nbits - 1)).half().cuda()
        w = PackedWeight(q, scale, zero, None, nbits, "int", GROUP, 1, K)
        return lambda x: launch.linear(x, w, None, None, "float")

    return [layer(i) for i in range(copies)]


def check(N: int, K: int, nbits: int, M: int) -> float:
    """Largest error against the reference, in units of what float16 rounding of the weights allows."""
    from hqqtensor.kernels.triton import launch
    from hqqtensor.ops import reference

    generator = torch.Generator().manual_seed(nbits)
    q = pack(torch.randint(0, 2**nbits, (N, K), dtype=torch.uint8, generator=generator), nbits).cuda()
    scale = (torch.rand(N, K // GROUP, generator=generator) * 0.01 + 0.01).half().cuda()
    zero = (torch.rand(N, K // GROUP, generator=generator) * (2**nbits - 1)).half().cuda()
    x = torch.randn(M, K, generator=generator).half().cuda()
    w = PackedWeight(q, scale, zero, None, nbits, "int", GROUP, 1, K)
    got = launch.linear(x, w, None, None, "float")
    dense = reference.dequantize(w, torch.float32)
    span = dense.abs() + (scale * zero).float().repeat_interleave(GROUP, 1)
    error = (got.double() - x.double() @ dense.double().T).abs() / (x.double().abs() @ span.double().T)
    return error.max().item() / 2**-10


def dense(N: int, K: int, copies: int) -> list[Call]:
    weights = [torch.randn(N, K, dtype=torch.float16, device="cuda") for _ in range(copies)]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]


def torchao_int4(N: int, K: int, copies: int) -> list[Call]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layers = []
    for _ in range(copies):
        layer = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device="cuda")
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
        layers.append(layer)
    return [lambda x, f=f: f(x.bfloat16()) for f in layers]


def gemlite_int(N: int, K: int, nbits: int, copies: int) -> list[Call]:
    from gemlite import DType, GemLiteLinear

    layers = []
    for _ in range(copies):
        layer = GemLiteLinear(nbits, GROUP, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 2**nbits, (N, K), dtype=torch.uint8, device="cuda")
        scale = torch.rand(N * K // GROUP, 1, dtype=torch.float16, device="cuda") * 0.01
        layer.pack(codes, scale, torch.full_like(scale, 2 ** (nbits - 1)), None)
        layers.append(layer)
    return list(layers)


def marlin_int4(N: int, K: int, copies: int) -> list[Call]:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test as utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_workspace_new,
    )
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    workspace = marlin_make_workspace_new(torch.device("cuda"))
    empty = torch.empty(0, dtype=torch.int, device="cuda")

    def layer() -> Call:
        weight = torch.randn(K, N, dtype=torch.float16, device="cuda")
        _, q, s, *_ = utils.marlin_quantize(weight, kind, GROUP, act_order=False)
        args = (q, s, empty, empty, empty, workspace, kind, N, K, True)
        return lambda x: apply_gptq_marlin_linear(x, *args)

    return [layer() for _ in range(copies)]


def mine(N: int, K: int, copies: int) -> dict[str, Callable[[], list[Call]]]:
    out: dict[str, Callable[[], list[Call]]] = {"dense fp16": lambda: dense(N, K, max(2, copies // 4))}
    for nbits in range(8, 0, -1):
        out[f"hqqtensor int{nbits}"] = lambda nbits=nbits: ours(N, K, nbits, copies)
    return out


def peers(N: int, K: int, copies: int) -> dict[str, Callable[[], list[Call]]]:
    out: dict[str, Callable[[], list[Call]]] = {}
    if importlib.util.find_spec("torchao"):
        out["torchao int4"] = lambda: torchao_int4(N, K, copies)
    if importlib.util.find_spec("gemlite"):
        for nbits in (8, 4, 2, 1):
            out[f"gemlite int{nbits}"] = lambda nbits=nbits: gemlite_int(N, K, nbits, copies)
    if importlib.util.find_spec("vllm"):
        out["Marlin int4"] = lambda: marlin_int4(N, K, copies)
    return out


def measure(rows: tuple[int, ...]) -> tuple[list[str], bool]:
    """Lines of the report, and whether every product of ours was within bounds."""
    name = torch.cuda.get_device_name()
    lines = [
        f"# Linear layers on {name}",
        "",
        f"torch {torch.__version__}, {platform.python_version()}, groups of {GROUP}.",
        "",
    ]
    good = True
    for N, K in SHAPES:
        worst = {nbits: max(check(N, K, nbits, M) for M in (1, 16, 128)) for nbits in range(1, 9)}
        good &= all(error <= 1 for error in worst.values())
        errors = ", ".join(f"{nbits} bits {error:.2f}" for nbits, error in worst.items())
        lines += [f"## {N} x {K}", "", f"Error against the reference (1 = the bound): {errors}.", ""]
        lines += ["us at M = | " + " | ".join(map(str, rows)), " | ".join(["---"] * (len(rows) + 1))]
        copies = max(2, CACHE // (N * K // 2))
        for label, make in {**mine(N, K, copies), **peers(N, K, copies)}.items():
            try:
                calls = make()
                cells = []
                for M in rows:
                    x = torch.randn(M, K, dtype=torch.float16, device="cuda")
                    cells.append(f"{median_time(graphed(calls, x), x) / len(calls) * 1e6:.1f}")
            except Exception as error:
                if label.startswith(("hqqtensor", "dense")):
                    raise
                cells = [f"failed: {type(error).__name__}: {str(error)[:80]}"]
            lines.append(" | ".join([label, *cells]))
            torch.cuda.empty_cache()
        lines.append("")
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write the tables to this file as well")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_linear needs a CUDA or HIP device; there is none here", file=sys.stderr)
        return 2
    lines, good = measure(tuple(args.rows))
    text = "\n".join(lines) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text)
    if not good:
        print("FAIL: a product is out of bounds", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
