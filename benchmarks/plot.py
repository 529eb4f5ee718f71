"""Figures of the benchmarks' results, written as PNG. Needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OURS_LIGHT, INT8, PEER, DENSE, FLOOR = "#1b6ca8", "#7fb5da", "#2a9d8f", "#b0b4b8", "#d9c8a9", "#c1121f"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})


def _save(figure: Any, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _color(row: dict[str, Any]) -> str:
    if row["kind"] != "ours":
        return {"peer": PEER, "dense": DENSE}[row["kind"]]
    return INT8 if row["computes in"] == "int8" else OURS if row["computes in"] == "bfloat16" else OURS_LIGHT


def _bars(axes: Any, labels: list[str], values: list[float], colors: list[str], form: str) -> None:
    """Horizontal bars, the first on top, each with its value at its end."""
    places = range(len(values))[::-1]
    axes.barh(places, values, color=colors, height=0.75)
    axes.set_yticks(places, labels)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            form.format(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )


def _legend(figure: Any, entries: list[tuple[str, str]]) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in entries]
    figure.legend(handles, [name for name, _ in entries], loc="outside lower center", ncols=len(entries), frameon=False)


def linear(cells: list[dict[str, Any]], path: str) -> None:
    """Milliseconds on the first shape, a panel for each M, with the time that the weight's bytes take to read."""
    shape = cells[0]["shape"]
    cells = [c for c in cells if c["shape"] == shape]
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    # The main settings; the others are in the tables.
    left_out = ("g32", "g128", "scales", "7-bit", "6-bit", "5-bit")
    keep = [r["name"] for r in cells[0]["rows"] if r["kind"] != "ours" or not any(s in r["name"] for s in left_out)]
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, (0.2 * len(keep) + 1) * lines + 0.5),
        layout="constrained",
        squeeze=False,
    )
    for axes, cell in zip(grid.flat, cells, strict=False):
        rows = sorted((r for r in cell["rows"] if r["name"] in keep), key=lambda r: r["ms"])
        _bars(axes, [r["name"] for r in rows], [r["ms"] for r in rows], [_color(r) for r in rows], "{:.2f}")
        floors = [r["bytes"] / cell["read GB/s"] / 1e6 for r in rows]
        axes.scatter(floors, range(len(rows))[::-1], marker="|", s=60, color=FLOOR, linewidths=1.5, zorder=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(floors) / 2, max(r["ms"] for r in rows) * 4)
        axes.set_title(f"M = {cell['M']}", loc="left", fontweight="bold")
        axes.tick_params(axis="y", labelsize=7.5, length=0)
    for axes in list(grid.flat)[len(cells) :]:
        axes.set_visible(False)
    figure.suptitle(f"{shape[0]} x {shape[1]}, milliseconds (log scale); red: the time to read the weight's bytes")
    entries = [
        ("ours, fp32", OURS_LIGHT),
        ("ours, bf16", OURS),
        ("ours, int8 activations", INT8),
        ("peers", PEER),
        ("dense", DENSE),
    ]
    _legend(figure, entries)
    _save(figure, path)


def decode(results: dict[str, Any], path: str) -> None:
    """Tokens a second, and seconds to the first token for each length of prompt."""
    rows = sorted(results["rows"], key=lambda r: -r["tokens/s"])
    firsts = [key for key in rows[0] if key.startswith("first token")]
    figure, grid = plt.subplots(
        1, 1 + len(firsts), figsize=(5 + 3.4 * len(firsts), 0.3 * len(rows) + 1.4), layout="constrained", sharey=True
    )
    names = [f"{r['name']}, {r['bytes'] / 1e9:.2f} GB" for r in rows]
    colors = [
        PEER if r["kind"] == "llama.cpp" else DENSE if "dense" in r["name"] else INT8 if "int8" in r["name"]
        else OURS if "bf16" in r["name"] else OURS_LIGHT
        for r in rows
    ]  # fmt: skip
    titles = [f"tokens a second, after {results['decode after']}"]
    titles += [f"first token of {key.split(', ')[1]}, seconds" for key in firsts]
    for axes, key, title in zip(grid, ["tokens/s", *firsts], titles, strict=True):
        _bars(axes, names, [r[key] for r in rows], colors, "{:.1f}" if key == "tokens/s" else "{:.2f}")
        axes.set_title(title, loc="left")
        axes.margins(x=0.15)
        axes.tick_params(axis="y", length=0)
    figure.suptitle("A Llama with the shapes of Llama-3.2-1B, random weights")
    entries = [
        ("ours, fp32", OURS_LIGHT),
        ("ours, bf16", OURS),
        ("ours, int8 activations", INT8),
        ("llama.cpp", PEER),
        ("dense", DENSE),
    ]
    _legend(figure, entries)
    _save(figure, path)


def quantize(rows: list[dict[str, Any]], path: str) -> None:
    """Weights a second by solver: 4 bits on every matrix to the left, all widths of the first matrix to the right."""
    first = rows[0]
    four = [r for r in rows if r["bits"] == 4 and not r["solver"].startswith("plain")]
    widths = [r for r in rows if (r["shape"], r["dtype"]) == (first["shape"], first["dtype"])]
    figure, grid = plt.subplots(1, 2, figsize=(10.5, 0.2 * max(len(four), len(widths)) + 1.6), layout="constrained")

    def name(row: dict[str, Any], by_width: bool) -> str:
        where = f"{row['bits']} bits" if by_width else f"{row['shape'][0]}x{row['shape'][1]} {row['dtype']}"
        return f"{row['solver']}, {where}"

    def color(row: dict[str, Any]) -> str:
        if row["solver"].startswith("plain"):
            return DENSE
        return {"hqq library": PEER, "rtn": OURS_LIGHT, "hqq": INT8}.get(row["solver"], OURS)

    titles = ("4 bits, groups of 64", f"{first['shape'][0]}x{first['shape'][1]} {first['dtype']}, all widths")
    for axes, chosen, title, by_width in zip(grid, (four, widths), titles, (False, True), strict=True):
        chosen = sorted(chosen, key=lambda r: -r["M weights/s"])
        _bars(
            axes,
            [name(r, by_width) for r in chosen],
            [r["M weights/s"] for r in chosen],
            [color(r) for r in chosen],
            "{:.3g}",
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(right=axes.get_xlim()[1] * 2)
        axes.set_title(title, loc="left")
        axes.tick_params(axis="y", labelsize=7.5, length=0)
    for aim, label in ((1000, "aim: rtn"), (100, "aim: hqq_joint")):
        grid[0].axvline(aim, color=FLOOR, linewidth=1, linestyle="--")
        grid[0].annotate(label, (aim, 0), xytext=(2, 2), textcoords="offset points", color=FLOOR, fontsize=7)
    figure.suptitle("Million weights a second, packing included (log scale)")
    _legend(
        figure,
        [("rtn", OURS_LIGHT), ("hqq", INT8), ("hqq_joint", OURS), ("plain torch path", DENSE), ("hqq library", PEER)],
    )
    _save(figure, path)
