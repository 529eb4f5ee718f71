"""Small pieces of Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every row must have as many cells as the header."""
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"a row of {len(cells)} cells in a table of {len(header)} columns: {cells}")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def ms(value: float | None) -> str:
    """Milliseconds with two figures that mean something; empty where nothing was measured."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times(value: float | None) -> str:
    """A ratio, such as "1.43 x"; empty where nothing was measured."""
    return "" if value is None else f"{value:.2f} x"


def span(values: Sequence[float]) -> str:
    """The range of some ratios: "1.10 to 1.49 x"."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low} x" if low == high else f"{low} to {high} x"
