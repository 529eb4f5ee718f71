"""Plots of what the benchmarks measure. Needs matplotlib; file names that end in .svg or .png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.docs import figures

BLUE, TEAL, GRAY, SAND, RED, PURPLE, OCHRE = (
    "#1b6ca8", "#2a9d8f", "#7d8590", "#b08d57", "#c1121f", "#7b2d8b", "#d18a00",
)  # fmt: skip
plt.rcParams.update(
    {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "hqqtensor"}
)
LAYER = {
    "4-bit bf16": ("hqqtensor, bf16", BLUE, "o-"),
    "4-bit int8 bf16": ("hqqtensor, int8", TEAL, "o-"),
    "llama.cpp Q4_K": ("llama.cpp Q4_K", GRAY, "s--"),
    "ATen int4pack": ("ATen int4pack", PURPLE, "^--"),
    "ONNX Runtime 4-bit int8": ("ONNX Runtime, int8", OCHRE, "v--"),
}
"""Lines of ``layer``: row, label, colour and style."""
ERRORS = {
    "hqq library": ("hqq {}-bit g64", GRAY, "s--"),
    "llama.cpp Q2_K to Q4_K": ("llama.cpp Q{}_K", OCHRE, "^--"),
    "GPTQ, on text": ("GPTQ {}-bit g64 (paper)", PURPLE, "v--"),
    "hqqtensor, groups of 64": ("hqqtensor {}-bit g64", TEAL, "o-"),
    "hqqtensor, the default": ("hqqtensor {}-bit default", BLUE, "o-"),
    "hqqtensor, on text": ("hqqtensor {}-bit g32 4-bit meta, full calibration", RED, "o-"),
}
"""Lines of ``errors``: label, method, colour and style."""


def save(figure: Figure, path: str | Path, data: Any = None) -> None:
    """Write the figure and its folder; an SVG names the ``figures.digest`` of ``data``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": f"data {figures.digest(data)}"} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=130, metadata=metadata, facecolor="white")
    plt.close(figure)


def layer(run: figures.Run) -> Figure:
    """How many times faster than the dense bf16 product each is, by the number of tokens."""
    dense = figures.row(run, "dense bf16")["ms"]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    ends = []
    for name, (label, color, style) in LAYER.items():
        points = [
            (n, base / time)
            for n, base, time in zip(run["tokens"], dense, figures.row(run, name)["ms"], strict=True)
            if time is not None
        ]
        axes.plot(*zip(*points, strict=True), style, color=color, linewidth=2, markersize=5)
        ends.append((points[-1], label, color))
    axes.axhline(1, color=SAND, linewidth=1.5)
    ends.append(((run["tokens"][-1], 1.0), "dense bf16", SAND))
    _scales(axes, run["tokens"], "tokens (rows of x)")
    axes.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set_ylabel("times as fast as dense bf16")
    N, K = run["shape"]
    where = ", ".join(run[key] for key in ("machine", "set") if key in run)
    axes.set_title(f"One {N} x {K} layer at 4 bits (higher is better)\n{where}".rstrip(), loc="left", fontsize=11)
    _label_ends(axes, ends)
    return figure


def errors(rows: Sequence[dict[str, Any]], model: str, unit: str) -> Figure:
    """Error by bits a weight, a line for each kind of method."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    by_method = {one["method"]: one for one in rows if one["task"] == model}
    ends = []
    for label, (method, color, style) in ERRORS.items():
        found = [by_method[method.format(bits)] for bits in (2, 3, 4)]
        points = [(one["bits"], one["main"][0]) for one in found]
        axes.plot(*zip(*points, strict=True), style, color=color, linewidth=2, markersize=5)
        ends.append((points[-1], label, color))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits a weight, everything counted")
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(f"Error of {model} by size (lower is better)", loc="left", fontsize=11)
    _label_ends(axes, ends)
    return figure


def tokens(run: figures.Run) -> Figure:
    """Tokens a second of ``generate()``, a panel for each model: one sequence, the shortest prompt."""
    models = list(dict.fromkeys(one["model"] for one in run["rows"]))
    figure, grid = plt.subplots(1, len(models), figsize=(4 + 3 * len(models), 2.6), layout="constrained", squeeze=False)
    for axes, model in zip(grid.flat, models, strict=True):
        single = [one for one in run["rows"] if one["model"] == model and one["batch"] == 1]
        shortest = min(one["context"] for one in single)
        rows = [one for one in single if one["context"] == shortest]
        _bars(axes, [r["name"] for r in rows], [r["tokens/s"] for r in rows], [_color(r) for r in rows], "{:.1f}")
        axes.set_title(f"{model}, prompt of {shortest} tokens", loc="left", fontsize=11)
        axes.set_xlabel("tokens a second")
    figure.suptitle("generate(), each side as its users call it (higher is better)", fontsize=11)
    return figure


def speed_quality(run: figures.Run) -> Figure:
    """KL against tokens a second, a disc for each setting, its area the bytes of the model."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = {"ours": BLUE, "peer": OCHRE, "other": PURPLE}
    rows = [one for one in run["rows"] if one["kl"] > 0.0005]  # the dense model has no place on a logarithmic scale
    for one in rows:
        kind = "peer" if one["name"].startswith("llama.cpp") else one["kind"] if one["kind"] == "ours" else "other"
        axes.scatter(one["tokens/s"], one["kl"], s=3 * one["MB"], color=colors[kind], alpha=0.55, linewidths=0)
        label = f"{one['name'].removeprefix('hqqtensor ')}, {one['MB']:.0f} MB"
        away = 3 + (3 * one["MB"]) ** 0.5 / 2
        offset, ha, va = {"ours": ((away, 0), "left", "center"), "peer": ((-away, 0), "right", "center")}.get(
            kind, ((0, -away), "left", "top")
        )
        axes.annotate(
            label, (one["tokens/s"], one["kl"]), xytext=offset, textcoords="offset points", ha=ha, va=va,
            color=colors[kind], fontsize=8.5,
        )  # fmt: skip
    for label, color in (("hqqtensor", BLUE), ("llama.cpp", OCHRE), ("others in transformers", PURPLE)):
        axes.scatter([], [], color=color, alpha=0.55, s=60, label=label, linewidths=0)
    axes.legend(frameon=False, loc="lower left")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.05, y=0.12)
    axes.set_xlim(right=1.35 * max(one["tokens/s"] for one in rows))
    axes.set_xlabel("tokens a second, generate() on two cores (farther right is better)")
    axes.set_ylabel("KL to the dense model (higher up is better)")
    axes.grid(alpha=0.2)
    axes.set_title(f"SmolLM2-135M-Instruct, {run['machine']}; area: size of the model", loc="left", fontsize=11)
    return figure


def solvers(run: figures.Run) -> Figure:
    """Million weights a second by solver at 4 bits, float32 weights."""
    named = {}
    for one in run["rows"]:
        plain = one["solver"].startswith("plain ")
        if one["dtype"] == "fp32" and one["bits"] == 4 and not (plain and one["format"] != "int"):
            name = one["solver"].removeprefix("plain ") + (f", {one['format']}" if one["format"] != "int" else "")
            named[f"{name}, torch code" if plain else name] = one["M weights/s"]
    named = dict(sorted(named.items(), key=lambda item: -item[1]))
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(named) + 1.2), layout="constrained")
    colors = [GRAY if "library" in n else SAND if "torch" in n else BLUE for n in named]
    _bars(axes, list(named), list(named.values()), colors, "{:.3g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.set_xlabel("million weights a second, packing included (log scale)")
    axes.set_title("Quantizing to 4 bits (higher is better)", loc="left", fontsize=11)
    return figure


def linear(cells: list[dict[str, Any]], path: str) -> None:
    """``layer`` of a result of benchmarks.cpu_linear, its first shape."""
    save(layer(figures.from_linear({"cells": cells})), path)


def generate(results: list[dict[str, Any]], path: str) -> None:
    """``tokens`` of a result of benchmarks.generate."""
    save(tokens(figures.from_generate(results)), path)


def quantize(rows: list[dict[str, Any]], path: str) -> None:
    """``solvers`` of a result of benchmarks.cpu_quantize."""
    save(solvers(figures.from_quantize({"rows": rows})), path)


def _color(one: dict[str, Any]) -> str:
    if one["kind"] == "ours":
        return TEAL if one.get("computes in") == "int8" else BLUE
    return SAND if one["kind"] == "dense" else GRAY


def _scales(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(axis="y", alpha=0.3)


def _bars(axes: Axes, labels: list[str], values: list[float], colors: list[str], form: str) -> None:
    """Horizontal bars, the first on top, each with its value at its end."""
    places = range(len(values))[::-1]
    axes.barh(places, values, color=colors, height=0.7)
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    for place, value in zip(places, values, strict=True):
        axes.annotate(form.format(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center")


def _label_ends(axes: Axes, ends: list[tuple[tuple[float, float], str, str]], gap: float = 18) -> None:
    """Write each line's label to the right of the plot at its last point's height, ``gap`` pixels or more apart."""
    axes.figure.canvas.draw()
    heights = [axes.transData.transform(point)[1] for point, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + gap) if placed else heights[i])
    # Half of what the labels were pushed up by, so that they stay around their lines.
    shift = sum(p - heights[i] for p, i in zip(placed, order, strict=True)) / len(placed)
    right = axes.get_xlim()[1]
    for height, i in zip(placed, order, strict=True):
        (x, y), label, color = ends[i]
        level = axes.transData.inverted().transform((0, height - shift))[1]
        axes.annotate(
            label, (x, y), xytext=(right * 1.02, level), color=color, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.8},
        )  # fmt: skip
