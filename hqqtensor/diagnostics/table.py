"""Tables of plain text: the first column to the left, the others to the right."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned cells; every row has as many cells as ``header``."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def megabytes(count: int | float) -> str:
    """``count`` bytes in units of 10^6 bytes."""
    return f"{count / 1e6:.2f} MB"
