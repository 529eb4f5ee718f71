"""What the results say: a row for each method, with intervals and ratios to the hqq library."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.statistics import mean_interval, ratio_interval
from hqqtensor.diagnostics.table import text_table

MAIN = {"SmolLM2": "kl", "doclm": "kl", "MiniLM": "distance"}
DATA = ("", "model", "text")
"""What a method looks at besides the weights, least first: nothing, the model run on random tokens, text."""
Result = dict[str, Any]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _base(results: list[Result], one: Result) -> Result | None:
    """hqq's result at the same nominal bits on the same model."""
    want = f"hqq {one['nbits']}-bit g64"
    return next((r for r in results if r["task"] == one["task"] and r["method"] == want), None)


def front(results: list[Result], task: str) -> set[str]:
    """Names of the methods that no other with the same data or less beats at equal or fewer bits."""
    mine = [r for r in results if r["task"] == task]
    value = {r["method"]: _mean(r["windows"][MAIN[task]]) for r in mine}
    return {
        r["method"]
        for r in mine
        if not any(
            o["bits"] <= r["bits"] + 1e-9 and value[o["method"]] < value[r["method"]]
            for o in mine
            if DATA.index(o["data"]) <= DATA.index(r["data"])
        )
    }


def rows(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each result, most bits first: errors as mean and 95 % interval, shares from 0 to 1."""
    out = []
    for task in MAIN:
        best = front(results, task)
        mine = [r for r in results if r["task"] == task]
        for r in sorted(mine, key=lambda r: (-r["nbits"], r["bits"])):
            windows, base = r["windows"], _base(results, r)
            main = windows[MAIN[task]]
            row = {key: r[key] for key in ("task", "method", "ours", "nbits", "bits")}
            row |= {"data": r["data"] or "none", "best": r["method"] in best}
            row |= {f"{kind} error": r["errors"][kind] for kind in ("weight", "output")}
            row["main"] = mean_interval(main)
            row["to hqq"] = base and ratio_interval(main, base["windows"][MAIN[task]])
            if MAIN[task] == "kl":
                row["perplexity"] = math.exp(_mean(windows["loss"]))
                row["rise"] = row["perplexity"] / math.exp(_mean(windows["dense_loss"])) - 1
                row |= {key: _mean(windows[key]) for key in ("top1", "top5")}
            else:
                row |= {"nearest": _mean(windows["retrieval"]), "nearest five": _mean(windows["retrieval5"])}
            out.append(row)
    return out


def show(table: list[dict[str, Any]]) -> None:
    """The columns that matter most, as text."""
    cells = [
        (
            r["task"],
            r["method"],
            r["data"],
            f"{r['bits']:.3f}",
            f"{r['main'][0]:.5f}",
            "" if r["to hqq"] is None else f"{r['to hqq'][0]:.2f}",
        )
        for r in table
    ]
    print(text_table(("model", "method", "data", "bits/weight", "KL or 1 - cosine", "of hqq's"), cells))


def write(table: list[dict[str, Any]], file: Path) -> None:
    """The rows as JSON, one a line, with the date; ``python -m benchmarks.docs`` makes the pages and plots from it."""
    head = json.dumps({"date": time.strftime("%Y-%m-%d"), "versions": {"torch": torch.__version__}})
    lines = ",\n".join(f" {json.dumps(row)}" for row in table)
    file.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
