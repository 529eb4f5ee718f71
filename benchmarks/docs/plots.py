"""The plots of the documentation: which there are, what each is drawn from, and whether the files are up to date."""

from pathlib import Path
from typing import Any

from benchmarks.docs.figures import digest, quality, runs

FOLDER = Path(__file__).parents[2] / "docs" / "plots"
PLOTS = (
    "layer_amd.svg", "layer_intel.svg", "generate.svg", "speed_quality.svg", "quantize.svg", "errors_doclm.svg",
    "errors_minilm.svg",
)  # fmt: skip


def data(name: str) -> Any:
    """What the plot ``name`` is drawn from."""
    if name.startswith("layer"):
        return runs("linear")["zen4" if name == "layer_amd.svg" else "intel"]
    if name == "generate.svg":
        return runs("generate")["intel"]
    if name == "speed_quality.svg":
        return runs("speed_quality")["intel"]
    if name == "quantize.svg":
        return runs("quantize")["zen4"]
    model = "doclm" if name == "errors_doclm.svg" else "MiniLM"
    return [one for one in quality()["rows"] if one["task"] == model]


def write() -> None:
    """Draw every plot, and delete what is no longer one; needs matplotlib."""
    from benchmarks import plot

    for name in PLOTS:
        found = data(name)
        if name.startswith("layer"):
            figure = plot.layer(found)
        elif name == "generate.svg":
            figure = plot.tokens(found)
        elif name == "speed_quality.svg":
            figure = plot.speed_quality(found)
        elif name == "quantize.svg":
            figure = plot.solvers(found)
        elif name == "errors_doclm.svg":
            figure = plot.errors(found, "doclm", "KL from the dense model (nats a token)")
        else:
            figure = plot.errors(found, "MiniLM", "1 - cosine to the dense model's embeddings")
        plot.save(figure, FOLDER / name, found)
    for path in FOLDER.iterdir():
        if path.name not in PLOTS:
            path.unlink()


def stale() -> list[str]:
    """Names of plots that are missing, were drawn from other figures, or are no longer made; needs no matplotlib."""
    wrong = [path.name for path in FOLDER.iterdir() if path.name not in PLOTS]
    for name in PLOTS:
        path = FOLDER / name
        if not path.is_file() or f"data {digest(data(name))}" not in path.read_text():
            wrong.append(name)
    return wrong
