"""``python -m benchmarks.cpu_linear``: y = x W^T, ours against dense and against ATen's own packed products.

Everything for one shape and M runs interleaved in one loop with a read loop beside it; the share of the read loop's
bandwidth counts packed codes, scales and zero points. Several copies of each weight take turns so that no weight stays
in a cache. Peers that are not installed are left out and named.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import ReadLoop, interleaved, machine, write_json
from hqqtensor import HQQTensor, backend
from hqqtensor.diagnostics.table import text_table
from hqqtensor.packing import row_bytes

CACHE = 96 << 20  # bytes that the copies of a weight must exceed together


def random_weight(N: int, K: int, nbits: int, group_size: int = 64, axis: int = 1) -> HQQTensor:
    """Random codes and scales: what is timed does not depend on them."""
    groups = (N, -(-K // group_size)) if axis == 1 else (-(-N // group_size), K)
    qdata = torch.randint(0, 256, (N, row_bytes(K, nbits)), dtype=torch.uint8)
    scale = (torch.rand(groups) * 0.01 + 0.001).half()
    zero = (torch.rand(groups) * (2**nbits - 1)).half()
    return HQQTensor(qdata, scale, nbits, group_size, axis, torch.Size((N, K)), torch.float32, zero_point=zero)


def ours(q: HQQTensor, x: torch.Tensor) -> tuple[Callable[[], object], int]:
    """A run over copies of ``q``, checked against the dense product first; and its bytes."""
    q = q.to(x.dtype)
    with backend("dequantize"):
        d = q.dequantize(torch.float32)
    want = x.float() @ d.T
    error = (F.linear(x, q).float() - want).abs().max() / want.abs().max()
    assert error < (1e-4 if x.dtype == torch.float32 else 2e-2), f"wrong by {error:.2e}"
    copies = itertools.cycle([q.clone() for _ in range(CACHE // q.nbytes + 1)])
    return lambda: F.linear(x, next(copies)), q.nbytes


def dense(N: int, K: int, x: torch.Tensor) -> Callable[[], object]:
    w = torch.randn(N, K).to(x.dtype)
    return lambda: F.linear(x, w)


def int4pack(N: int, K: int, x: torch.Tensor) -> Callable[[], object]:
    """ATen's 4-bit product, g64, bfloat16."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
    scale = (torch.rand(N, K // 64) * 0.01 + 0.001).bfloat16()
    zero = torch.zeros(N, K // 64).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    x = x.bfloat16()
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, both).float()
    want = x.float() @ ((codes.float() - 8) * scale.float().repeat_interleave(64, 1)).T
    assert (got - want).abs().max() / want.abs().max() < 2e-2
    copies = itertools.cycle([packed.clone() for _ in range(CACHE // packed.nbytes + 1)])
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(copies), 64, both)


def int8pack(N: int, K: int, x: torch.Tensor) -> Callable[[], object]:
    """ATen's 8-bit product, one scale a row, bfloat16."""
    w = torch.randint(-127, 127, (N, K), dtype=torch.int8)
    scale = (torch.rand(N) * 0.01 + 0.001).bfloat16()
    x = x.bfloat16()
    got = torch.ops.aten._weight_int8pack_mm(x, w, scale).float()
    want = (x.float() @ w.float().T) * scale.float()
    assert (got - want).abs().max() / want.abs().max() < 2e-2
    copies = itertools.cycle([w.clone() for _ in range(CACHE // w.nbytes + 1)])
    return lambda: torch.ops.aten._weight_int8pack_mm(x, next(copies), scale)


def matmul_nbits(N: int, K: int, x: torch.Tensor, accuracy: int) -> Callable[[], object] | str:
    """ONNX Runtime's MatMulNBits, 4 bits g64: accuracy 0 computes in float32, 4 in int8."""
    try:
        import numpy as np
        import onnx
        import onnxruntime
    except ImportError as error:
        return str(error)
    codes = np.random.randint(0, 256, (N, K // 64, 32), dtype=np.uint8)
    scale = (np.random.rand(N * K // 64) * 0.01 + 0.001).astype(np.float32)
    low, high = codes & 15, codes >> 4
    both = np.stack([low, high], -1).reshape(N, K).astype(np.float32) - 8
    w = both * np.repeat(scale, 64).reshape(N, K)
    copies = (96 << 20) // codes.nbytes + 1
    sessions = []
    for i in range(copies):
        init = [onnx.numpy_helper.from_array(codes, "B"), onnx.numpy_helper.from_array(scale, "S")]
        node = onnx.helper.make_node(
            "MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=K, N=N, bits=4, block_size=64,
            accuracy_level=accuracy,
        )  # fmt: skip
        f32 = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node], f"g{i}", [onnx.helper.make_tensor_value_info("A", f32, list(x.shape))],
            [onnx.helper.make_tensor_value_info("Y", f32, [x.shape[0], N])], init,
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
    feed = {"A": x.float().numpy()}
    want = feed["A"] @ w.T
    error = np.abs(sessions[0].run(None, feed)[0] - want).max() / np.abs(want).max()
    assert error < (1e-4 if accuracy == 0 else 5e-2), error
    turns = itertools.cycle(sessions)
    return lambda: next(turns).run(None, feed)


def quanto(N: int, K: int, x: torch.Tensor) -> Callable[[], object] | str:
    """optimum-quanto's qint4."""
    try:
        from optimum.quanto import QLinear, freeze, qint4
    except ImportError as error:
        return str(error)
    layer = QLinear.from_module(torch.nn.Linear(K, N, bias=False), weights=qint4)
    freeze(layer)
    return lambda: layer(x)


def run_shape(N: int, K: int, M: int, widths: list[int], seconds: float) -> dict[str, Any]:
    """Median milliseconds and shares of the read bandwidth of every contender at one shape."""
    x = torch.randn(M, K)
    x16 = x.bfloat16()
    read = ReadLoop()
    runs: dict[str, Callable[[], object]] = {"read loop": read, "dense fp32": dense(N, K, x)}
    runs["dense bf16"] = dense(N, K, x16)
    runs["ATen int4pack bf16"] = int4pack(N, K, x)
    runs["ATen int8pack bf16"] = int8pack(N, K, x)
    missing = {}
    for name, made in (
        ("ONNX Runtime fp32", lambda: matmul_nbits(N, K, x, 0)),
        ("ONNX Runtime int8", lambda: matmul_nbits(N, K, x, 4)),
        ("quanto qint4", lambda: quanto(N, K, x)),
    ):
        run = made()
        if isinstance(run, str):
            missing[name] = run
        else:
            runs[name] = run
    nbytes: dict[str, int] = {}
    for nbits in widths:
        for label, inputs in (("fp32", x), ("bf16", x16)):
            name = f"{nbits}-bit {label}"
            runs[name], nbytes[name] = ours(random_weight(N, K, nbits), inputs)
    for group_size, axis in ((32, 1), (128, 1), (64, 0)):
        name = f"4-bit fp32 g{group_size} axis {axis}"
        runs[name], nbytes[name] = ours(random_weight(N, K, 4, group_size, axis), x)
    times = interleaved(runs, rounds=31, seconds=seconds)
    bandwidth = read.bandwidth(times.pop("read loop"))
    rows = {}
    for name, t in times.items():
        share = nbytes[name] / t / bandwidth if name in nbytes else None
        rows[name] = {"ms": 1e3 * t, "to 4-bit fp32": t / times["4-bit fp32"], "share of read bandwidth": share}
    return {"shape": [N, K], "M": M, "read GB/s": bandwidth / 1e9, "rows": rows, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--shapes", nargs="+", default=["11008x4096", "4096x4096", "4096x11008"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 128, 512])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 5, 4, 3, 2, 1])
    parser.add_argument("--seconds", type=float, default=10, help="for each shape and number of tokens")
    args = parser.parse_args()
    print(machine())
    results = []
    with torch.no_grad():
        for shape, M in itertools.product(args.shapes, args.tokens):
            N, K = map(int, shape.split("x"))
            r = run_shape(N, K, M, args.bits, args.seconds)
            results.append(r)
            cells = []
            for name, row in r["rows"].items():
                share = row["share of read bandwidth"]
                cells.append(
                    (name, f"{row['ms']:.3f}", f"{row['to 4-bit fp32']:.2f}", "" if share is None else f"{share:.0%}")
                )
            print(f"\n{shape}, M={M}, read loop {r['read GB/s']:.1f} GB/s")
            print(text_table(("", "ms", "x of 4-bit fp32", "read bandwidth"), cells), flush=True)
            for name, why in r["missing"].items():
                print(f"left out: {name} ({why})")
            write_json(args.json, results)


if __name__ == "__main__":
    main()
