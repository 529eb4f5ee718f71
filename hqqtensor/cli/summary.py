"""What ``hqqtensor quantize`` says of what it has written."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtensor import HqqConfig
from hqqtensor.cli import byte_table
from hqqtensor.cli.next_command import command_to_try
from hqqtensor.cli.output import print_json
from hqqtensor.diagnostics.left_dense import DenseGroup
from hqqtensor.diagnostics.size import ModelSize
from hqqtensor.diagnostics.table import megabytes


@dataclass(frozen=True)
class Summary:
    """Sizes of the dense and the quantized model, what stayed dense, the time, the settings, and what a search says.

    weight_error: of the weights that this process quantized, relative; None where it was not measured.
    """

    before: ModelSize
    after: ModelSize
    dense: list[DenseGroup]
    seconds: float
    config: HqqConfig
    measured: dict[str, Any] | None = None
    weight_error: float | None = None


def report(out: Path, summary: Summary, as_json: bool) -> None:
    """Print what was written to ``out``, how large it is, where its bytes are, and what to do next."""
    parts = byte_table.parts_of(out)
    before, after = summary.before, summary.after
    if as_json:
        print_json(
            {
                "out_dir": str(out),
                "bytes_before": before.nbytes,
                "bytes_after": after.nbytes,
                "quantized_weights": after.quantized_weights,
                "bits_per_weight": after.bits_per_weight,
                "parts": byte_table.as_dicts(parts),
                "left_dense": [dataclasses.asdict(group) for group in summary.dense],
                "seconds": summary.seconds,
                "weight_error": summary.weight_error,
                "config": summary.config.to_dict(),
                **({} if summary.measured is None else {"search": summary.measured}),
            }
        )
        return
    print(f"wrote {out}")
    ratio = before.nbytes / after.nbytes
    print(f"size: {megabytes(before.nbytes)} -> {megabytes(after.nbytes)} ({ratio:.2f}x smaller)")
    millions = after.quantized_weights / 1e6
    print(f"quantized: {millions:.2f} million weights at {after.bits_per_weight:.3f} bits, metadata counted")
    print(f"left dense: {megabytes(after.nbytes - after.quantized_nbytes)}")
    for group in summary.dense:
        print(f"  {group}")
    if summary.weight_error is not None:
        print(f"error of the weights: {100 * summary.weight_error:.2f} %")
    print(f"time to quantize: {summary.seconds:.1f} s")
    byte_table.show_parts(parts)
    print(f"try it: {command_to_try(out)}")
