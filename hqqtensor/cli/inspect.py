"""``hqqtensor inspect``: what a checkpoint holds, from the headers of its files alone."""

import argparse
import math
from typing import Any

from hqqtensor.cli.errors import UsageError, from_files
from hqqtensor.cli.output import print_json, print_table
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.serialization import inspect_checkpoint

_FIELDS = ("name", "kind", "shape", "dtype", "nbits", "group_size", "axis", "format", "nbytes")


def _row(entry: Any) -> dict[str, Any]:
    row = {name: getattr(entry, name) for name in _FIELDS}
    row["shape"] = list(row["shape"])
    row["dtype"] = str(row["dtype"]).removeprefix("torch.")
    return row


def run(args: argparse.Namespace) -> int:
    """Read the headers and print one line a tensor."""
    if not args.dir.exists():
        raise UsageError(f"{args.dir} does not exist")
    with from_files():
        report = inspect_checkpoint(args.dir)
    rows = [_row(entry) for entry in report.tensors]
    quantized = [row for row in rows if row["kind"] == "hqq"]
    weights = sum(math.prod(row["shape"]) for row in quantized)
    bits = 8 * sum(row["nbytes"] for row in quantized) / weights if weights else None
    if args.json:
        print_json({"nbytes": report.nbytes, "bits_per_weight": bits, "tensors": rows})
        return 0
    header = ("tensor", "kind", "shape", "dtype", "bits", "group", "axis", "format", "bytes")
    print_table(header, [tuple(_cell(row[name]) for name in _FIELDS) for row in rows])
    print(f"{len(rows)} tensors, {len(quantized)} quantized, {megabytes(report.nbytes)}")
    if bits is not None:
        print(f"{bits:.3f} bits a quantized weight, metadata counted")
    return 0


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return "x".join(map(str, value)) or "scalar" if isinstance(value, list) else str(value)
