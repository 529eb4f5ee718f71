"""``hqqtensor quantize``: a Hugging Face model directory in, a quantized one out."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hqqtensor import HqqConfig, quantize_, save_model
from hqqtensor.cli import model_dir
from hqqtensor.cli.output import CommandError, UsageError, print_json, progress_on_stderr
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import token_windows
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.presets import BYTE_UNITS, parse_size
from hqqtensor.search import choose_config, measure_sensitivity, random_tokens


def group_size(text: str) -> int | None:
    """A number, or "none" for one group a row."""
    return None if text.lower() == "none" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--bits", type=int, default=4, help="bits a weight, 1 to 8 (default 4)")
    parser.add_argument("--group-size", type=group_size, default=64, help="weights a scale, or 'none' (default 64)")
    parser.add_argument("--axis", type=int, default=1, help="1 groups along inputs, 0 along outputs (default 1)")
    parser.add_argument("--solver", default="hqq_joint", help="hqq_joint (default), hqq or rtn")
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="TAG=BITS/GROUP", help="own settings by layer; TAG=none: left alone"
    )
    parser.add_argument(
        "--skip", nargs="*", default=None, metavar="TAG", help="modules left alone, in place of the default lm_head"
    )
    parser.add_argument(
        "--quant-metadata",
        type=int,
        nargs="?",
        const=8,
        metavar="BITS",
        help="scales and zero points in 8 bits, or in 4",
    )
    parser.add_argument(
        "--target-bpw", type=float, metavar="BITS", help="choose settings by layer: average bits a weight"
    )
    parser.add_argument("--target-size", metavar="SIZE", help="choose settings by layer: bytes of the model, e.g. 4GiB")
    parser.add_argument("--sensitivity", type=Path, metavar="FILE", help="JSON to keep and reuse for --target-*")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on for --target-*")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUT_DIR")
    parser.add_argument("--json", action="store_true", help="the summary as JSON, no progress")


def parse_layers(entries: list[str]) -> dict[str, dict[str, Any] | None] | None:
    """``["self_attn.q_proj=4/64", "mlp=none"]`` as a ``dynamic_config``; ValueError for anything else."""
    layers: dict[str, dict[str, Any] | None] = {}
    for entry in entries:
        tag, _, settings = entry.partition("=")
        bits, slash, group = settings.partition("/")
        try:
            if not tag or tag in layers:
                raise ValueError
            if settings.lower() == "none":
                layers[tag] = None
            else:
                layers[tag] = {"nbits": int(bits), **({"group_size": group_size(group)} if slash else {})}
        except ValueError:
            raise ValueError(f"--layers takes TAG=BITS/GROUP or TAG=none, each tag once, got {entry!r}") from None
    return layers or None


def make_config(args: argparse.Namespace) -> HqqConfig:
    """The HqqConfig that the arguments ask for; UsageError where it refuses."""
    try:
        return HqqConfig(
            nbits=args.bits,
            group_size=args.group_size,
            axis=args.axis,
            solver=args.solver,
            quant_scale=args.quant_metadata is not None,
            quant_zero=args.quant_metadata is not None,
            **({} if args.quant_metadata is None else {"meta_nbits": args.quant_metadata}),
            dynamic_config=parse_layers(args.layers),
            **({} if args.skip is None else {"skip_modules": args.skip}),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_search(args: argparse.Namespace) -> int | None:
    """The bytes that ``--target-size`` asks for; UsageError for options that do not go together."""
    if args.target_bpw is None and args.target_size is None:
        if args.sensitivity is not None or args.text is not None:
            raise UsageError("--sensitivity and --text are for --target-bpw or --target-size")
        return None
    if args.target_bpw is not None and args.target_size is not None:
        raise UsageError("give one of --target-bpw and --target-size")
    if args.layers:
        raise UsageError(
            "--target-bpw and --target-size choose the settings of all layers: leave --layers out, use --skip"
        )
    if args.target_bpw is not None and not 0 < args.target_bpw < float("inf"):
        raise UsageError(f"--target-bpw must be over 0, got {args.target_bpw}")
    try:
        return None if args.target_size is None else int(parse_size(args.target_size, "--target-size", BYTE_UNITS))
    except ValueError as error:
        raise UsageError(str(error)) from error


def searched(model: Any, config: HqqConfig, nbytes: int | None, args: argparse.Namespace) -> HqqConfig:
    """``config`` with settings by layer for the target, measured on text or, without one, on random tokens."""
    context = min(256, getattr(model.config, "max_position_embeddings", 256))
    if args.text is None:
        vocabulary = getattr(model.config, "vocab_size", None)
        if vocabulary is None:
            raise CommandError(
                "the model takes no tokens, so that sensitivities cannot be measured from the command line"
            )
        batches = random_tokens(vocabulary, context)
    else:
        windows = token_windows(
            model_dir.open_tokenizer(args.model_dir), args.text.read_text(encoding="utf-8"), context
        )
        batches = [{"input_ids": windows[:8]}]
    with progress_on_stderr("measuring", not args.json) as progress:
        found = measure_sensitivity(model, config, batches, file=args.sensitivity, progress=progress)
    return choose_config(model, found, config, args.target_bpw, nbytes).config


def run(args: argparse.Namespace) -> int:
    """Quantize, write, report."""
    config, target = make_config(args), check_search(args)
    source, out = args.model_dir.resolve(), args.out_dir.resolve()
    settings = model_dir.read_config(source)
    model_dir.check_output(out, source, args.overwrite)
    model = model_dir.open_dense(source)
    before = model_size(model)
    if args.target_bpw is not None or target is not None:
        config = searched(model, config, target, args)
    started = time.perf_counter()
    with progress_on_stderr("quantizing", not args.json) as progress:
        quantize_(model, config, progress=progress)
    seconds = time.perf_counter() - started
    after = model_size(model)

    settings["quantization_config"] = {
        "quant_method": model_dir.QUANT_METHOD,
        **config.to_dict(),
        "source": str(source),
    }
    with model_dir.written_at_once(out) as work:
        save_model(model, work, max_shard_size=args.max_shard_size, non_persistent_buffers=False)
        model_dir.copy_companions(source, work)
        (work / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    summary = {
        "out_dir": str(out),
        "bytes_before": before.nbytes,
        "bytes_after": after.nbytes,
        "quantized_weights": after.quantized_weights,
        "bits_per_weight": after.bits_per_weight,
        "seconds": seconds,
        "config": config.to_dict(),
    }
    if args.json:
        print_json(summary)
    else:
        print(f"wrote {out}")
        ratio = before.nbytes / after.nbytes
        print(f"size: {megabytes(before.nbytes)} -> {megabytes(after.nbytes)} ({ratio:.2f}x smaller)")
        millions = after.quantized_weights / 1e6
        print(f"quantized: {millions:.2f} million weights at {after.bits_per_weight:.3f} bits, metadata counted")
        print(f"time to quantize: {seconds:.1f} s")
    return 0
