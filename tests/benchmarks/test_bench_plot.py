"""Figures are written from results of the shape that the benchmarks give."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot


def image(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_linear(tmp_path: Path) -> None:
    kinds = (
        ("4-bit fp32", "ours", "float32"),
        ("4-bit int8 fp32", "ours", "int8"),
        ("ATen int4pack", "peer", "bfloat16"),
    )
    rows = [{"name": n, "kind": k, "computes in": c, "ms": 1.0 + i, "bytes": 1e6} for i, (n, k, c) in enumerate(kinds)]
    cells = [{"shape": [256, 512], "M": M, "read GB/s": 40.0, "rows": rows} for M in (1, 4, 16, 64)]
    plot.linear(cells, str(tmp_path / "new" / "linear.png"))
    assert image(tmp_path / "new" / "linear.png")


def test_decode(tmp_path: Path) -> None:
    rows = [
        {"name": name, "kind": kind, "bytes": 1e9, "tokens/s": 30.0, "first token, 128": 1.5}
        for name, kind in (("4-bit bf16", "torch"), ("llama.cpp Q4_0", "llama.cpp"), ("dense bf16", "torch"))
    ]
    plot.decode({"rows": rows, "decode after": 128}, str(tmp_path / "decode.png"))
    assert image(tmp_path / "decode.png")


def test_quantize(tmp_path: Path) -> None:
    solvers = ("rtn", "hqq_joint", "plain rtn", "hqq library")
    rows = [
        {"solver": s, "shape": [256, 512], "dtype": "fp32", "bits": b, "M weights/s": 10.0}
        for s in solvers
        for b in (4, 2)
    ]
    plot.quantize(rows, str(tmp_path / "quantize.png"))
    assert image(tmp_path / "quantize.png")
