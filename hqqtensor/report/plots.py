"""The plots of the page as SVG without colours or fonts of its own: the page's style sheet gives them.

matplotlib draws with colours that stand for names, and each is replaced by a CSS variable afterwards, so that one
drawing serves light and dark. Names of layers never become text of a plot.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, GRID, SERIES = "#010101", "#020202", ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
"""What stands for the colour of text, of lines behind the data, and of the data."""

_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.figsize": (6.4, 3.2),
}  # fmt: skip


def bytes_by_layer(layers: Sequence[Mapping[str, Any]]) -> str:
    """Megabytes of each decoder layer, and below its bits a weight."""
    numbers, totals = _totals(layers)

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.bar(numbers, [totals[n][0] / 1e6 for n in numbers], color=SERIES[0], width=0.8)
        upper.set_ylabel("MB")
        lower.bar(numbers, [8 * totals[n][0] / totals[n][1] for n in numbers], color=SERIES[1], width=0.8)
        lower.set_ylabel("bits a weight")
        lower.set_xlabel("layer")

    return svg("bytes", draw, (6.4, 4.2))


def _totals(layers: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Numbers of the decoder layers, and bytes and weights of each."""
    totals: dict[int, tuple[int, int]] = {}
    for layer in layers:
        if layer["number"] is not None:
            size, weights = totals.get(layer["number"], (0, 0))
            count = 1
            for extent in layer["shape"]:
                count *= extent
            totals[layer["number"]] = size + layer["bytes"], weights + count
    return sorted(totals), totals


def error_by_layer(layers: Sequence[Mapping[str, Any]]) -> str:
    """Relative squared error of each weight of the decoder layers, one colour a kind (in the order of the legend)."""
    kinds = kinds_of(layers)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, kind in enumerate(kinds):
            points = [(x["number"], x["error"]) for x in layers if x["kind"] == kind and x["number"] is not None]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, color=SERIES[i % len(SERIES)])
        _logarithmic(axes, [layer["error"] for layer in layers if layer["number"] is not None])
        axes.set_ylabel("relative squared error")
        axes.set_xlabel("layer")

    return svg("error", draw)


def kinds_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kinds of weights within decoder layers, in the order of the model: the order of the colours."""
    return list(dict.fromkeys(layer["kind"] for layer in layers if layer["number"] is not None))


def worst_layer(histogram: Mapping[str, Any], name: str) -> str:
    """Histograms of the weights of one layer, before and after, and of its codes; ``name``: of the drawing."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        edges = histogram["edges"]
        if histogram["before"] is not None:
            left.stairs(histogram["before"], edges, color=SERIES[0], fill=True, alpha=0.35)
        left.stairs(histogram["after"], edges, color=SERIES[1])
        left.set_xlabel("weight")
        left.set_yticks([])
        right.bar(range(len(histogram["codes"])), histogram["codes"], color=SERIES[1], width=0.9)
        right.set_xlabel("code")
        right.set_yticks([])

    return svg(name, draw, (6.4, 2.4))


def sensitivity(figures: Mapping[str, Any]) -> str:
    """Loss of the model when one layer alone is quantized, layer by layer, a line for each number of bits."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values: list[float] = []
        for i, (width, losses) in enumerate(figures["loss"].items()):
            points = [(place, loss) for place, loss in enumerate(losses) if loss is not None]
            values += [loss for _, loss in points]
            axes.plot(*zip(*points, strict=True), linewidth=1, color=SERIES[i % len(SERIES)], label=f"{width} bits")
        _logarithmic(axes, values)
        axes.set_xlabel("weight, in the order of the model")
        axes.set_ylabel("KL in nats" if figures["method"] == "outputs" else "weighted squared error")
        axes.legend()

    return svg("sensitivity", draw)


def quality(figures: Mapping[str, Any]) -> str:
    """KL against bits a weight: settings measured on SmolLM2, and this model's point where there is one."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, (calibrated, label) in enumerate(((False, "SmolLM2"), (True, "SmolLM2, calibrated"))):
            rows = sorted(
                (p["bits"], p["kl"]) for p in figures["measured"] if p["setting"].endswith("good") is calibrated
            )
            axes.plot(*zip(*rows, strict=True), "o-", markersize=5, linewidth=1, color=SERIES[i], label=label)
        values = [point["kl"] for point in figures["measured"]]
        if figures["this"] is not None:
            values.append(figures["this"]["kl"])
            axes.plot(
                [figures["this"]["bits"]], [figures["this"]["kl"]], "*", markersize=15, color=SERIES[2],
                label="this model",
            )  # fmt: skip
        _logarithmic(axes, values)
        axes.set_xlabel("bits a weight of the layers")
        axes.set_ylabel("KL to the original, nats")
        axes.legend()

    return svg("quality", draw)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis, where there are no zeros."""
    if values and min(values) > 0:
        axes.set_yscale("log")


def svg(name: str, draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 3.2)) -> str:
    """The SVG element of a figure that ``draw`` fills; its ids begin with ``name``. ImportError without matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", re.sub(r'href="#', f'href="#{name}-', text))
    # The figure's background is white: the page's shows instead.
    text = re.sub(r"fill: #ffffff|fill: white", "fill: none", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()
