"""``hqqtensor compare``: how far two models are from one another on a text, and what each takes."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hqqtensor.cli import evaluate, model_dir
from hqqtensor.cli.errors import UsageError
from hqqtensor.cli.output import print_json, print_table
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import LanguageComparison, compare_language_models
from hqqtensor.diagnostics.size import ModelSize
from hqqtensor.diagnostics.table import megabytes


def run(args: argparse.Namespace) -> int:
    """Check both directories, open them, compare them on the text, report."""
    evaluate.check_windows(args)
    text = model_dir.read_text(args.text)
    vocabularies = []
    for directory in (args.a, args.b):
        model_dir.quantization_of(directory)
        empty = evaluate.check_predicts(directory, args.context)
        vocabularies.append(empty.config.get_text_config().vocab_size)
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(f"{args.a} and {args.b} have vocabularies of {vocabularies[0]} and {vocabularies[1]} tokens")
    windows = evaluate.windows_of(args.a, text, args)
    a, b = open_any(args.a), open_any(args.b)
    result = compare_language_models(a, b, windows)
    sizes = [model_size(a), model_size(b)]
    if args.json:
        print_json(as_dict(result, sizes, args))
    else:
        show(result, sizes, args)
    return 0


def open_any(directory: Path) -> Any:
    """The model of a directory, quantized by hqqtensor or dense, in eval mode."""
    is_dense = model_dir.quantization_of(directory) is None
    return model_dir.open_dense(directory) if is_dense else model_dir.open_quantized(directory)


def as_dict(result: LanguageComparison, sizes: list[ModelSize], args: argparse.Namespace) -> dict[str, Any]:
    """The figures, JSON-safe."""
    perplexities = (result.perplexity_before, result.perplexity_after)
    models = [
        {
            "dir": str(directory),
            "perplexity": perplexity,
            "bytes": size.nbytes,
            "bits_per_weight": size.bits_per_weight if size.quantized_weights else None,
        }
        for directory, perplexity, size in zip((args.a, args.b), perplexities, sizes, strict=True)
    ]
    figures = {k: v for k, v in dataclasses.asdict(result).items() if not k.startswith("perplexity")}
    return {**figures, "a": models[0], "b": models[1]}


def show(result: LanguageComparison, sizes: list[ModelSize], args: argparse.Namespace) -> None:
    """A row for each model, and how far B is from A."""
    rows = []
    perplexities = (result.perplexity_before, result.perplexity_after)
    for directory, perplexity, size in zip((args.a, args.b), perplexities, sizes, strict=True):
        bits = f"{size.bits_per_weight:.3f}" if size.quantized_weights else "dense"
        rows.append((str(directory), megabytes(size.nbytes), bits, f"{perplexity:.4f}"))
    print_table(("", "size", "bits/weight", "perplexity"), rows)
    print(f"{result.tokens} tokens predicted in windows of {args.context}; {args.b} against {args.a}:")
    print(f"KL               {result.kl:.6f} nats a token")
    print(f"top-1 agreement  {100 * result.top1_agreement:.2f} %")
    print(f"top-5 agreement  {100 * result.top5_agreement:.2f} %  (B's first choice among A's first five)")
