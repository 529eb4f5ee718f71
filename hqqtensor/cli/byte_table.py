"""The table of where a model's bytes are, as ``quantize``, ``card`` and ``report`` show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqqtensor.cli import model_dir
from hqqtensor.cli.output import print_table
from hqqtensor.diagnostics.byte_parts import BytePart, parts_of_checkpoint
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.serialization import inspect_checkpoint

HEADER = ("where the bytes are", "weights", "codes", "scales, zeros", "in all", "bits/weight", "share")


def parts_of(directory: Path) -> list[BytePart]:
    """The parts of a quantized directory, from the headers of its files and its config alone."""
    return parts_of_checkpoint(inspect_checkpoint(directory), model_dir.empty_model_of(directory))


def rows_of(parts: Sequence[BytePart]) -> list[tuple[str, ...]]:
    """A row for each part, and the last for all of them."""
    total = BytePart(
        "in all", *(sum(getattr(p, n) for p in parts) for n in ("weights", "code_bytes", "metadata_bytes"))
    )
    rows: list[tuple[str, ...]] = []
    for part in (*parts, total):
        sizes = (megabytes(part.code_bytes), megabytes(part.metadata_bytes), megabytes(part.nbytes))
        share = part.nbytes / total.nbytes
        rows.append((part.name, f"{part.weights:,}", *sizes, f"{part.bits_per_weight:.2f}", f"{share:.0%}"))
    return rows


def show_parts(parts: Sequence[BytePart]) -> None:
    """The table on stdout."""
    print_table(HEADER, rows_of(parts))


def as_dicts(parts: Sequence[BytePart]) -> list[dict[str, Any]]:
    """The parts, JSON-safe."""
    return [
        {
            "part": part.name,
            "weights": part.weights,
            "code_bytes": part.code_bytes,
            "metadata_bytes": part.metadata_bytes,
            "bits_per_weight": part.bits_per_weight,
        }
        for part in parts
    ]
