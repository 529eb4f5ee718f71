"""``hqqtensor report``: one self-contained HTML page about a quantized model."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.cli import byte_table, card, evaluate, model_dir, running
from hqqtensor.cli.errors import CommandError, UsageError, from_arguments, writing
from hqqtensor.cli.output import print_json, progress_on_stderr
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import LanguageComparison, compare_language_models
from hqqtensor.report import figures as collected
from hqqtensor.report.page import page
from hqqtensor.search import Sensitivity, measure_sensitivity
from hqqtensor.whole_file import write_text_whole

MEASURING_SECONDS = 20.0
"""How long sensitivities are measured where no file has them; the layers that are left are estimated."""
MEASURED_WINDOWS = 2
WRITTEN_TOKENS = 48


def run(args: argparse.Namespace) -> int:
    """Check all that the arguments say, collect the figures, write the page."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("this command needs matplotlib (pip install 'hqqtensor[report]')")
    entry = model_dir.quantization_of(args.dir)
    if entry is None:
        raise UsageError(f"{args.dir} is not quantized: its config.json has no quantization_config")
    out = args.output or Path(f"{args.dir.resolve().name}-report.html")
    check_output(out)
    windows = check_text(args)
    sensitivity = check_sensitivity(args)
    facts = card.facts_of(args.dir, entry)

    model: Any = model_dir.open_quantized(args.dir)
    original: Any = None if args.original is None else model_dir.open_dense(args.original)
    comparison = None
    if windows is not None:
        comparison = compare_language_models(original, model, windows)
        if sensitivity is None:
            sensitivity = measure(original, windows, args)
    figures = figures_of(facts, model, original, comparison, sensitivity)
    figures["texts"] = texts_of(model, original, windows, args)
    with writing(out):
        write_text_whole(out, page(figures))
    if args.json:
        print_json({"page": str(out), **figures})
    else:
        size = f"{len(figures['layers'])} quantized weights, {out.stat().st_size / 1e3:.0f} KB"
        print(f"wrote {out}: {size}; open it in a browser")
    return 0


def check_output(out: Path) -> None:
    """UsageError where the page must not be written there."""
    if out.exists() and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{out} exists and is no .html file; name another one with -o")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"{out} cannot be written: there is no directory {out.resolve().parent}")


def check_text(args: argparse.Namespace) -> Tensor | None:
    """The windows of ``--text``, None without one; UsageError where the originals or the text do not serve."""
    if args.original is not None:
        model_dir.read_dense_config(args.original)
        vocabularies = [model_dir.read_config(place).get("vocab_size") for place in (args.original, args.dir)]
        if vocabularies[0] != vocabularies[1]:
            raise UsageError(
                f"{args.original} is not the original of {args.dir}: vocabularies of {vocabularies[0]} and "
                f"{vocabularies[1]}"
            )
    if args.prompt is not None:
        running.check_writes(args.dir)
    if args.text is None:
        return None
    if args.original is None:
        raise UsageError("--text compares the model with its original: give --original too")
    evaluate.check_windows(args)
    evaluate.check_predicts(args.original, args.context)
    return evaluate.windows_of(args.dir, model_dir.read_text(args.text), args)


def check_sensitivity(args: argparse.Namespace) -> Sensitivity | None:
    """The measurements of ``--sensitivity``; UsageError where the file is damaged or of another model."""
    if args.sensitivity is None:
        return None
    with from_arguments():
        sensitivity = Sensitivity.load(args.sensitivity)
        sensitivity.check_model(model_dir.empty_model_of(args.dir), args.sensitivity)
    return sensitivity


def measure(original: Any, windows: Tensor, args: argparse.Namespace) -> Sensitivity:
    """Sensitivities of the original's layers on a few windows, within MEASURING_SECONDS."""
    batches = [{"input_ids": windows[:MEASURED_WINDOWS]}]
    with progress_on_stderr("measuring", not args.json) as progress:
        return measure_sensitivity(original, None, batches, progress=progress, time_limit=MEASURING_SECONDS)


def figures_of(
    facts: dict[str, Any], model: Any, original: Any, comparison: LanguageComparison | None,
    sensitivity: Sensitivity | None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of the page but the texts."""
    layers = collected.layer_figures(model, original)
    return {
        **{name: facts[name] for name in ("name", "source", "architecture", "settings", "config", "versions")},
        "parts": byte_table.as_dicts(facts["parts"]),
        "layers": layers,
        "worst": collected.histograms(model, original, collected.worst_layers(layers)),
        "sensitivity": None if sensitivity is None else collected.sensitivity_figures(sensitivity),
        "quality": collected.quality_figures(model_size(model).bits_per_weight, comparison),
        "comparison": collected.comparison_figures(comparison),
    }


def texts_of(model: Any, original: Any, windows: Tensor | None, args: argparse.Namespace) -> dict[str, Any] | None:
    """How model and original go on from the prompt, or from the first words of the text; None without either."""
    if args.prompt is None and windows is None:
        return None
    tokenizer = model_dir.open_tokenizer(args.dir)
    if args.prompt is not None:
        ids = tokenizer(args.prompt, return_tensors="pt")["input_ids"]
    else:
        assert windows is not None
        ids = windows[:1, : min(16, windows.shape[1] // 2)]
    texts = {"prompt": tokenizer.decode(ids[0], skip_special_tokens=True), "original": None}
    texts["quantized"] = written(model, tokenizer, ids)
    if original is not None:
        texts["original"] = written(original, tokenizer, ids)
    return texts


@torch.no_grad()
def written(model: Any, tokenizer: Any, ids: Tensor) -> str:
    """The likeliest tokens that the model goes on with."""
    longest = running.longest_context(model) or 2**31
    new = min(WRITTEN_TOKENS, longest - ids.shape[1])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(1, new), pad_token_id=0,
        **running.greedy(),
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
