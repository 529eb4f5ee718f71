"""``--target-bpw`` and ``--target-size`` of ``hqqtensor quantize``."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from hqqtensor import HqqConfig
from hqqtensor.cli import model_dir
from hqqtensor.cli.calibration import is_calibrated
from hqqtensor.cli.errors import from_arguments
from hqqtensor.cli.output import duration, progress_on_stderr
from hqqtensor.diagnostics.language import token_windows
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.presets import BYTE_UNITS, parse_size


def is_search(args: argparse.Namespace) -> bool:
    """Whether settings are to be chosen for each layer."""
    return args.target_bpw is not None or args.target_size is not None


def check_arguments(args: argparse.Namespace) -> int | None:
    """The bytes that ``--target-size`` asks for; ValueError for options that do not go together or mean nothing."""
    if not is_search(args):
        if args.fast or any(given is not None for given in (args.sensitivity, args.text, args.time_limit)):
            raise ValueError("--sensitivity, --text, --fast and --time-limit are for --target-bpw or --target-size")
        return None
    if args.target_bpw is not None and args.target_size is not None:
        raise ValueError("give one of --target-bpw and --target-size")
    if args.layers:
        raise ValueError(
            "--target-bpw and --target-size choose the settings of all layers: leave --layers out, use --skip"
        )
    if args.target_bpw is not None and not 0 < args.target_bpw < float("inf"):
        raise ValueError(f"--target-bpw must be over 0, got {args.target_bpw}")
    if args.fast and args.text is not None:
        raise ValueError("--fast measures from weights alone: leave --text out")
    if args.time_limit is not None and not args.time_limit > 0:
        raise ValueError(f"--time-limit must be over 0 seconds, got {args.time_limit}")
    if args.sensitivity is not None and not args.sensitivity.resolve().parent.is_dir():
        raise ValueError(f"--sensitivity {args.sensitivity}: there is no directory {args.sensitivity.resolve().parent}")
    return None if args.target_size is None else int(parse_size(args.target_size, "--target-size", BYTE_UNITS))


def check_model(empty: Any, config: HqqConfig, target_bytes: int | None, args: argparse.Namespace) -> None:
    """ValueError where the search does not fit the model, of which ``empty`` has names and shapes and no numbers."""
    from hqqtensor.search import Sensitivity, check_target

    if _takes_random_tokens(args) and not isinstance(getattr(empty.config, "vocab_size", None), int):
        raise ValueError(
            f"{args.model_dir}: the model takes no tokens, so --target-* cannot measure its outputs; use --fast"
        )
    # What stays dense counts for a size, in the dtype that config.json names for the weights.
    dtype = getattr(empty.config, "dtype", None)
    if args.target_bpw is not None or isinstance(dtype, torch.dtype):
        check_target(empty.to(dtype), config, args.target_bpw, target_bytes, _candidates(args))
    if args.sensitivity is not None and args.sensitivity.exists():
        Sensitivity.load(args.sensitivity).check_model(empty, args.sensitivity)


def run(
    model: Any, config: HqqConfig, target_bytes: int | None, text: str | None, tokenizer_dir: Path,
    options: dict[str, Any], args: argparse.Namespace, offloaded: OffloadedBlocks | None = None,
) -> tuple[HqqConfig, dict[str, Any]]:  # fmt: skip
    """``config`` with settings by layer for the target, and what the summary says of the search.

    Outputs are measured on ``text``, else on batches of the calibration, else on random tokens. options: of
    ``quantize_``; where they ask for a calibration that the search needs, the calibration itself takes its place.
    offloaded: ``model`` where its blocks lie on disk.
    """
    from hqqtensor.search import check_target, choose_config, measure_sensitivity

    with from_arguments():  # again with the dtypes that the weights really have
        check_target(model, config, args.target_bpw, target_bytes, _candidates(args))
        batches = _batches(model, text, tokenizer_dir, args)
    wanted = not args.json
    calibrated = None if args.fast else _shared_calibration(model, options, wanted)
    with progress_on_stderr("measuring", wanted) as progress:
        sensitivity = measure_sensitivity(
            model, config, batches, _candidates(args), args.sensitivity, progress, calibrated, args.time_limit,
            functools.partial(_announce, limit=args.time_limit) if wanted else None, offloaded,
        )  # fmt: skip
    estimated, total = len(sensitivity.estimated), len(sensitivity.layers)
    if estimated and wanted:
        print(
            f"--time-limit: {total - estimated} of {total} layers were measured; the losses of the others are "
            "estimated from layers of the same kind",
            file=sys.stderr,
        )
    with from_arguments():
        choice = choose_config(model, sensitivity, config, args.target_bpw, target_bytes)
    method = {"method": sensitivity.method, "measured": total - estimated, "estimated": estimated}
    return choice.config, {**method, "settings": choice.counts}


def _candidates(args: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    from hqqtensor.search import CANDIDATES, EMBEDDINGS

    return (*CANDIDATES, *EMBEDDINGS) if args.embeddings == "auto" else CANDIDATES


def _takes_random_tokens(args: argparse.Namespace) -> bool:
    return args.text is None and not args.fast and not is_calibrated(args)


def _batches(model: Any, text: str | None, tokenizer_dir: Path, args: argparse.Namespace) -> list[Any] | None:
    """Batches of the text or of random tokens; None for ``--fast``, and where the calibration has some."""
    from hqqtensor.search import random_tokens

    context = min(256, getattr(model.config, "max_position_embeddings", 256))
    if text is not None:
        return [{"input_ids": token_windows(model_dir.open_tokenizer(tokenizer_dir), text, context)[:8]}]
    return random_tokens(model.config.vocab_size, context) if _takes_random_tokens(args) else None


def _shared_calibration(model: Any, options: dict[str, Any], wanted: bool) -> Any:
    """The calibration that ``options`` ask for, put into its place there; None where they ask for none."""
    if "calibration" not in options:
        return None
    from hqqtensor.calibration import calibrate
    from hqqtensor.quantize import QUALITIES

    source, tokenizer = options["calibration"], options.pop("tokenizer", None)
    with progress_on_stderr("calibrating", wanted) as progress:
        options["calibration"] = calibrate(model, source, QUALITIES[options["quality"]], progress, tokenizer)
    return options["calibration"]


def _announce(seconds: float, layers: int, limit: float | None) -> None:
    end = "" if limit is None or seconds < limit else f"; --time-limit ends it after {duration(limit)}"
    print(f"measuring {layers} more layers takes about {duration(seconds)}{end}", file=sys.stderr, flush=True)
