"""``python -m hqqtensor.demo``: three real models, before and after. Every figure printed is computed here.

SmolLM2, a chat model, answers a question at 4, 3 and 2 bits. doclm, a small Llama trained for this project, and MiniLM,
an encoder, are measured at 8, 4, 3 and 2 bits. ``models`` says where they come from.
"""

import copy
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor import hqq_weight_only, quantize_
from hqqtensor.cli.errors import CommandError
from hqqtensor.cli.output import print_table
from hqqtensor.demo.chat import show_chat
from hqqtensor.demo.models import DOCLM, load_doclm, load_minilm
from hqqtensor.diagnostics import collect_quantization_debug_info, model_size
from hqqtensor.diagnostics.language import LanguageComparison, compare_language_models, token_windows
from hqqtensor.diagnostics.table import megabytes

BITS, CONTEXT = (8, 4, 3, 2), 256
PROMPT = "The function returns"
QUERY = "How can a model use less memory?"
SENTENCES = (
    "Quantization stores the weights of a network in fewer bits.",
    "The cat slept on the warm stones by the river.",
    "A recipe for bread needs flour, water, salt and time.",
    "Stock markets fell after the central bank raised its rate.",
    "Gradient descent moves parameters against the slope of the loss.",
    "Compressing parameters lets large networks run on a laptop.",
    "The train to the coast leaves at nine every morning.",
    "Rain is expected in the north towards the evening.",
)


@dataclass(frozen=True)
class Measured:
    """A model at one width. error: mean relative squared error of its quantized weights. seconds: time to quantize."""

    nbits: int
    nbytes: int
    bits_per_weight: float
    error: float
    seconds: float
    model: nn.Module


def quantized(original: nn.Module, nbits: int) -> Measured:
    """A quantized copy of ``original`` with the default settings of a width, and what it costs."""
    model = copy.deepcopy(original)
    started = time.perf_counter()
    quantize_(model, hqq_weight_only(nbits))
    seconds = time.perf_counter() - started
    size = model_size(model)
    error = collect_quantization_debug_info(model, original).relative_error
    assert error is not None
    return Measured(nbits, size.nbytes, size.bits_per_weight, error, seconds, model)


def compare_doclm(original: nn.Module, other: nn.Module, tokenizer: Any, tokens: int) -> LanguageComparison:
    """Both models on the first ``tokens`` tokens of the held-out text."""
    text = (DOCLM / "valid.txt").read_text(encoding="utf-8")
    return compare_language_models(original, other, token_windows(tokenizer, text, CONTEXT)[: tokens // CONTEXT])


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Unit sentence embeddings ``[S, D]``: the mean over real tokens, as MiniLM was trained."""
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def held_out_lines(count: int) -> list[str]:
    """The first ``count`` lines of at least 40 characters of doclm's held-out text: sentences to embed."""
    lines = (DOCLM / "valid.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if len(line.strip()) >= 40][:count]


def same_neighbour(before: Tensor, after: Tensor) -> float:
    """Share of the embeddings ``[S, D]`` whose nearest other embedding is the same one in both sets."""

    def nearest(e: Tensor) -> Tensor:
        return (e @ e.T).fill_diagonal_(-1).argmax(-1)

    return (nearest(before) == nearest(after)).float().mean().item()


def generate(model: Any, tokenizer: Any) -> str:
    """The model's greedy continuation of ``PROMPT`` by 24 tokens."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _common(m: Measured) -> tuple[str, ...]:
    return f"{m.nbits}", megabytes(m.nbytes), f"{m.bits_per_weight:.2f}", f"{m.error:.5f}"


def show_doclm(tokens: int = 16384) -> None:
    """Print the table of doclm and its text before and after."""
    original, tokenizer = load_doclm()
    dense = model_size(original)
    rows, texts, before = [], [("dense", generate(original, tokenizer))], float("nan")
    for nbits in BITS:
        m = quantized(original, nbits)
        r = compare_doclm(original, m.model, tokenizer, tokens)
        before = r.perplexity_before
        rise = r.perplexity_after / before - 1
        agree = (f"{r.top1_agreement:.1%}", f"{r.top5_agreement:.1%}")
        rows.append((*_common(m), f"{r.perplexity_after:.2f}", f"{rise:+.1%}", *agree, f"{m.seconds:.2f} s"))
        texts.append((f"{nbits} bits", generate(m.model, tokenizer)))
    first = ("dense", megabytes(dense.nbytes), "32.00", "0", f"{before:.2f}", "", "", "", "")
    header = ("bits", "size", "bits/weight", "error", "perplexity", "rise", "top-1", "top-5", "time")
    print_table(header, [first, *rows], f"doclm, {dense.parameters / 1e6:.1f} million parameters, lm_head left dense")
    for name, text in texts:
        print(f"{name:>7}: {text!r}")


def show_minilm(lines: int = 256) -> None:
    """Print the table of MiniLM and a nearest sentence before and after."""
    original, tokenizer = load_minilm()
    dense = model_size(original)
    sentences = held_out_lines(lines)
    before = embed(original, tokenizer, sentences)
    rows, neighbours = [], [("dense", _nearest(original, tokenizer))]
    for nbits in BITS:
        m = quantized(original, nbits)
        after = embed(m.model, tokenizer, sentences)
        cosine = (before * after).sum(-1).mean().item()
        same = f"{same_neighbour(before, after):.1%}"
        rows.append((*_common(m), f"{cosine:.4f}", same, f"{m.seconds:.2f} s"))
        neighbours.append((f"{nbits} bits", _nearest(m.model, tokenizer)))
    first = ("dense", megabytes(dense.nbytes), "32.00", "0", "1", "", "")
    header = ("bits", "size", "bits/weight", "error", "cosine", "same neighbour", "time")
    print_table(header, [first, *rows], f"MiniLM, {dense.parameters / 1e6:.1f} million parameters, {lines} sentences")
    print(f"nearest to {QUERY!r}:")
    for name, text in neighbours:
        print(f"{name:>7}: {text}")


def _nearest(model: nn.Module, tokenizer: Any) -> str:
    e = embed(model, tokenizer, [QUERY, *SENTENCES])
    scores = e[1:] @ e[0]
    best = int(scores.argmax())
    return f"{SENTENCES[best]} ({scores[best]:.3f})"


def main() -> int:
    """Run all parts; 1 where a model is missing."""
    try:
        show_chat()
        print()
        show_doclm()
        print()
        show_minilm()
    except CommandError as error:
        print(f"hqqtensor demo: {error}", file=sys.stderr)
        return 1
    return 0
