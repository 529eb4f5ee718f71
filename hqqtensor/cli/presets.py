"""``--preset`` and ``--format`` of ``hqqtensor quantize``."""

import argparse
import dataclasses
from typing import Any

from hqqtensor import HqqConfig
from hqqtensor.formats import get_format
from hqqtensor.presets import PRESETS, UnknownPresetError


def preset_config(args: argparse.Namespace, layers: dict[str, Any] | None) -> HqqConfig:
    """The preset of ``--preset``; ValueError where there is none of this name, or beside options that it decides.

    layers: what ``--layers`` says.
    """
    decided = {
        "--bits": args.bits is not None, "--group-size": args.group_size != "auto", "--axis": args.axis != 1,
        "--format": args.format != "int", "--solver": args.solver is not None,
        "--quant-metadata": args.quant_metadata is not None, "--target-bpw": args.target_bpw is not None,
        "--target-size": args.target_size is not None,
    }  # fmt: skip
    also = [option for option, is_given in decided.items() if is_given]
    if also:
        raise ValueError(f"--preset decides what {', '.join(also)} would: give one or the other")
    try:
        config = PRESETS[args.preset]
    except UnknownPresetError as error:
        raise ValueError(f"--preset: there is no preset {args.preset!r}, only {', '.join(PRESETS)}") from error
    changes: dict[str, Any] = {"dynamic_config": layers}
    if args.embeddings != "auto":
        changes["embedding_nbits"] = args.embeddings
    if args.skip is not None:
        changes["skip_modules"] = args.skip
    return dataclasses.replace(config, **config.given_groups(), **changes)


def default_bits(name: str) -> int:
    """4 bits where the format ``name`` has them, else the fewest that it has; ValueError for an unknown format."""
    widths = get_format(name).widths
    return 4 if 4 in widths else min(widths)
