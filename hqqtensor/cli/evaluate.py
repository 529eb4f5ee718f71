"""``hqqtensor eval``: perplexity before and after, and how often both models agree."""

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from hqqtensor import HqqConfig, quantize_
from hqqtensor.cli import model_dir, running
from hqqtensor.cli.errors import UsageError, from_arguments
from hqqtensor.cli.output import print_json, progress_on_stderr
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import LanguageComparison, compare_language_models, token_windows
from hqqtensor.diagnostics.size import ModelSize
from hqqtensor.selection import check_shapes, choose

_DENSE_OPTIONS = {"bits": "nbits", "group_size": "group_size", "embeddings": "embedding_nbits"}
"""Options for a dense DIR and the settings that they are; the arguments have only those that were given."""


def run(args: argparse.Namespace) -> int:
    """Check all that the arguments say, open both models, compare them on the text, report."""
    check_windows(args)
    entry = model_dir.quantization_of(args.dir)
    config = _dense_config(args) if entry is None else None
    source = args.dir if entry is None else original_of(args, entry)
    text = model_dir.read_text(args.text)
    check_models(source, args, config)
    windows = windows_of(args.dir, text, args)
    original = model_dir.open_dense(source)
    if config is None:
        quantized = model_dir.open_quantized(args.dir, args.mmap)
    else:
        quantized = copy.deepcopy(original)
        with progress_on_stderr("quantizing", not args.json) as progress:
            quantize_(quantized, config, progress=progress)
    result = compare_language_models(original, quantized, windows)
    report(result, source, model_size(original), model_size(quantized), args)
    return 0


def check_windows(args: argparse.Namespace) -> None:
    """UsageError for numbers of tokens that make no window."""
    if args.context < 2:
        raise UsageError(f"--context must be at least 2, got {args.context}")
    if args.max_tokens is not None and args.max_tokens < args.context:
        raise UsageError(f"--max-tokens {args.max_tokens} is less than one window of {args.context} (--context)")


def _dense_config(args: argparse.Namespace) -> HqqConfig:
    if args.original is not None:
        raise UsageError(f"{args.dir} is dense: --original is for a quantized DIR")
    with from_arguments():
        given = {name: getattr(args, option) for option, name in _DENSE_OPTIONS.items() if hasattr(args, option)}
        return HqqConfig(**{"embedding_nbits": 8, **given})


def original_of(args: argparse.Namespace, entry: dict[str, Any]) -> Path:
    """The dense model of a quantized directory: ``--original``, or the directory of the recorded name beside it."""
    if any(hasattr(args, option) for option in _DENSE_OPTIONS):
        raise UsageError(f"{args.dir} is quantized already: --bits, --group-size and --embeddings are for a dense DIR")
    if args.original is not None:
        return args.original
    name = entry.get("source")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{args.dir} does not record its original; name it with --original")
    # Files written before only the name was recorded have a whole path.
    beside = args.dir.resolve().parent / name
    if not beside.is_dir():
        raise UsageError(f"the original of {args.dir} was {name!r} and is not at {beside}; name it with --original")
    return beside


def check_models(source: Path, args: argparse.Namespace, config: HqqConfig | None) -> None:
    """UsageError where the models do not serve; looks at configs alone."""
    model_dir.read_dense_config(source)
    empty = check_predicts(source, args.context)
    if config is not None:
        with from_arguments():
            check_shapes(choose(empty, config)[0])
        return
    sizes = [model_dir.read_config(directory).get("vocab_size") for directory in (source, args.dir)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"{source} is not the original of {args.dir}: vocabularies of {sizes[0]} and {sizes[1]}")


def check_predicts(directory: Path, context: int) -> Any:
    """UsageError where a model has no perplexity on windows of ``context``; else the model without its numbers."""
    empty = running.check_writes(directory)
    longest = running.longest_context(empty)
    if longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the {longest} positions of the model")
    return empty


def windows_of(directory: Path, text: str, args: argparse.Namespace) -> Tensor:
    """Windows of the text by the tokenizer of a directory, as ``--context`` and ``--max-tokens`` ask."""
    with from_arguments():
        windows = token_windows(model_dir.open_tokenizer(directory), text, args.context)
    return windows if args.max_tokens is None else windows[: args.max_tokens // args.context]


def report(
    result: LanguageComparison, source: Path, before: ModelSize, after: ModelSize, args: argparse.Namespace
) -> None:
    """Print the figures."""
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
        return
    print(f"{result.tokens} tokens predicted in windows of {args.context}; original: {source}")
    print(f"perplexity       {result.perplexity_before:.4f} -> {result.perplexity_after:.4f}")
    print(f"KL to original   {result.kl:.6f} nats a token")
    print(f"top-1 agreement  {100 * result.top1_agreement:.2f} %")
    print(f"top-5 agreement  {100 * result.top5_agreement:.2f} %  (first choice among the original's first five)")
    print(f"bits a weight    {after.bits_per_weight:.3f}, metadata counted")
