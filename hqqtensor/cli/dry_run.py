"""``hqqtensor quantize --dry-run``: what would be quantized and how large it gets, from config and headers alone."""

import argparse
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hqqtensor import HqqConfig
from hqqtensor.cli import byte_table
from hqqtensor.cli.errors import UsageError
from hqqtensor.cli.output import print_json, print_table
from hqqtensor.diagnostics.byte_parts import parts_when_quantized
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.selection import choose
from hqqtensor.serialization import inspect_checkpoint

_TORCH_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def run(empty: Any, config: HqqConfig, is_search: bool, args: argparse.Namespace) -> int:
    """Say what ``config`` does to the model of MODEL_DIR; ``empty`` is that model without its numbers."""
    if is_search:
        raise UsageError("--dry-run cannot say what a search would choose: leave --target-bpw and --target-size out")
    parts = parts_when_quantized(empty, config)
    after, before = sum(part.nbytes for part in parts), sum(p.nbytes for p in empty.parameters())
    groups: Counter[tuple[str, str]] = Counter()
    for choice in choose(empty, config)[0]:
        groups[kind_of(choice.names[0]), settings_of(choice.settings)] += 1
    place = next(path for path in (args.out_dir.resolve(), *args.out_dir.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if args.json:
        layers = [{"weights": name, "settings": text, "count": n} for (name, text), n in groups.items()]
        sizes = {"bytes_before": before, "bytes_after": after, "free_bytes": free}
        parts_json = byte_table.as_dicts(parts)
        print_json({"dry_run": True, **sizes, "quantized": layers, "parts": parts_json, "config": config.to_dict()})
        return 0
    print_table(("would be quantized", "count", "settings"), [(n, str(c), s) for (n, s), c in groups.items()])
    byte_table.show_parts(parts)
    print(f"size: {megabytes(before)} -> about {megabytes(after)}; free at {place}: {megabytes(free)}")
    print("nothing was written; leave --dry-run out to do it")
    return 0


def with_stored_dtype(empty: Any, directory: Path) -> None:
    """Give the parameters of ``empty`` the dtype that most of the checkpoint's bytes have, by its headers."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in inspect_checkpoint(directory).tensors:
        if tensor.dtype in _TORCH_NAMES:
            sizes[_TORCH_NAMES[tensor.dtype]] += tensor.nbytes
    if sizes:
        empty.to(sizes.most_common(1)[0][0])


def kind_of(name: str) -> str:
    """The name of a weight with "*" for the number of its layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def settings_of(config: HqqConfig) -> str:
    """Bits, groups and scales in words."""
    fmt = "" if config.format == "int" else f" {config.format}"
    groups = "whole rows" if config.group_size is None else f"groups of {config.group_size}"
    scales = "" if config.scale_nbits is None else f", scales of {config.scale_nbits} bits"
    return f"{config.nbits} bits{fmt}, {groups}{scales}"
