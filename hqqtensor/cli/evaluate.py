"""``hqqtensor eval``: perplexity before and after, and how often both models agree."""

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.cli import model_dir
from hqqtensor.cli.output import CommandError, UsageError, print_json, progress_on_stderr
from hqqtensor.cli.quantize import group_size
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import compare_language_models, token_windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="quantized directory, or a dense one to try settings on")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    parser.add_argument(
        "--original", type=Path, metavar="DIR", help="dense model of a quantized DIR (default: recorded)"
    )
    parser.add_argument("--bits", type=int, help="for a dense DIR: bits a weight (default 4)")
    parser.add_argument("--group-size", type=group_size, default=-1, help="for a dense DIR: group size (default 64)")
    parser.add_argument("--context", type=int, default=256, help="tokens a window (default 256)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use at most N tokens of the text")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Open both models, compare them on the text, report."""
    if args.context < 2:
        raise UsageError(f"--context must be at least 2, got {args.context}")
    if args.max_tokens is not None and args.max_tokens < args.context:
        raise UsageError(f"--max-tokens {args.max_tokens} is less than one window of {args.context} (--context)")
    entry = model_dir.quantization_of(args.dir)
    config = None if entry is not None else _dense_config(args)
    if entry is not None and (args.bits is not None or args.group_size != -1):
        raise UsageError(f"{args.dir} is quantized already: --bits and --group-size are for a dense DIR")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {args.text}: {error}") from error

    source = args.dir if entry is None else _original_of(args, entry)
    original = _language_model(model_dir.open_dense(source), args.context)
    windows = token_windows(model_dir.open_tokenizer(args.dir), text, args.context)
    if args.max_tokens is not None:
        windows = windows[: args.max_tokens // args.context]
    if config is None:
        quantized = model_dir.open_quantized(args.dir)
    else:
        quantized = copy.deepcopy(original)
        with progress_on_stderr("quantizing", not args.json) as progress:
            quantize_(quantized, config, progress=progress)
    result = compare_language_models(original, quantized, windows)
    before, after = model_size(original), model_size(quantized)
    if args.json:
        print_json(
            {
                **dataclasses.asdict(result),
                "original": str(source),
                "bytes_before": before.nbytes,
                "bytes_after": after.nbytes,
                "bits_per_weight": after.bits_per_weight,
            }
        )
        return 0
    print(f"{result.tokens} tokens predicted in windows of {args.context}; original: {source}")
    print(f"perplexity       {result.perplexity_before:.4f} -> {result.perplexity_after:.4f}")
    print(f"KL to original   {result.kl:.6f} nats a token")
    print(f"top-1 agreement  {100 * result.top1_agreement:.2f} %")
    print(f"top-5 agreement  {100 * result.top5_agreement:.2f} %  (first choice among the original's first five)")
    print(f"bits a weight    {after.bits_per_weight:.3f}, metadata counted")
    return 0


def _dense_config(args: argparse.Namespace) -> HqqConfig:
    if args.original is not None:
        raise UsageError(f"{args.dir} is dense: --original is for a quantized DIR")
    try:
        return HqqConfig(
            nbits=4 if args.bits is None else args.bits, group_size=64 if args.group_size == -1 else args.group_size
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _original_of(args: argparse.Namespace, entry: dict[str, Any]) -> Path:
    if args.original is not None:
        return args.original
    source = entry.get("source")
    if not source:
        raise CommandError(f"{args.dir} does not record its original; name it with --original")
    if not Path(source).is_dir():
        raise CommandError(f"the original of {args.dir}, {source}, is gone; name it with --original")
    return Path(source)


def _language_model(model: nn.Module, context: int) -> nn.Module:
    config: Any = model.config
    if not model.can_generate() or getattr(config, "is_encoder_decoder", False):  # type: ignore[operator]
        raise CommandError(
            f"{type(model).__name__} is not a causal language model (no language-model head that predicts the next "
            "token), so it has no perplexity"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the {longest} positions of the model")
    return model
