"""``hqqtensor bench``: what a model does on this machine by plain ``generate()``."""

import argparse
import resource
import statistics
import sys
from typing import Any

import torch

from hqqtensor.cli import running
from hqqtensor.cli.errors import UsageError
from hqqtensor.cli.output import print_json, print_table
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.machine import memory_bandwidth
from hqqtensor.diagnostics.table import megabytes


def run(args: argparse.Namespace) -> int:
    """Open the model, write from a random prompt a few times, report medians."""
    empty = running.check_writes(args.dir)
    longest = running.longest_context(empty)
    if longest is not None and args.prompt_tokens + args.new_tokens > longest:
        raise UsageError(
            f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are more than the {longest} "
            f"positions of {args.dir}"
        )
    model = running.open_to_write(args.dir, args.bits, args.json, args.mmap)
    bandwidth = memory_bandwidth()
    timings = measure(model, args.prompt_tokens, args.new_tokens, args.rounds)
    figures = summary(model, timings, bandwidth)
    if args.json:
        print_json({"dir": str(args.dir), **figures})
    else:
        show(figures)
    return 0


def measure(model: Any, prompt_tokens: int, new_tokens: int, rounds: int) -> list[running.Timing]:
    """``rounds`` timings after one run to warm up; the prompt is random, and the answer never ends early."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, **running.greedy()}
    timings = []
    for _ in range(rounds + 1):
        streamer = running.TimedStreamer()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        timings.append(streamer.timing())
    return timings[1:]


def summary(model: Any, timings: list[running.Timing], bandwidth: float) -> dict[str, Any]:
    """The figures by name. bytes_per_token: what of the weights one new token reads."""
    first = statistics.median(timing.first_token_seconds for timing in timings)
    rates = [timing.tokens_per_second for timing in timings if timing.tokens_per_second is not None]
    rate = statistics.median(rates) if rates else None
    read = bytes_per_token(model)
    return {
        "threads": torch.get_num_threads(),
        "rounds": len(timings),
        "prompt_tokens": timings[0].prompt_tokens,
        "new_tokens": timings[0].new_tokens,
        "first_token_seconds": first,
        "prompt_tokens_per_second": timings[0].prompt_tokens / first,
        "decode_tokens_per_second": rate,
        "model_bytes": model_size(model).nbytes,
        "peak_resident_bytes": peak_resident_bytes(),
        "bytes_per_token": read,
        "read_bytes_per_second": None if rate is None else rate * read,
        "memory_bytes_per_second": bandwidth,
    }


def bytes_per_token(model: Any) -> int:
    """Bytes of the weights that one new token reads: all but the embedding's rows and experts that it does not take."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = set() if embedding is None else {id(embedding.weight)}
    if head is not None:
        tables.discard(id(head.weight))
    text = model.config.get_text_config()
    experts = next((n for n in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(text, n)), None)
    total = 0.0
    for parameter in model.parameters():
        if id(parameter) in tables:
            continue
        is_experts = parameter.ndim == 3 and experts is not None
        share = text.num_experts_per_tok / getattr(text, experts) if is_experts and experts is not None else 1
        total += parameter.nbytes * share
    return round(total)


def peak_resident_bytes() -> int:
    """The most memory that this process has held, the opening of the model included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show(figures: dict[str, Any]) -> None:
    """A table of the figures."""
    rate = figures["decode_tokens_per_second"]
    rows = [
        ("prompt", f"{figures['prompt_tokens_per_second']:.1f} tokens/s"),
        ("first token", f"{figures['first_token_seconds']:.3f} s"),
        ("decode", "-" if rate is None else f"{rate:.1f} tokens/s"),
        ("model", megabytes(figures["model_bytes"])),
        ("resident at most", megabytes(figures["peak_resident_bytes"])),
    ]
    if rate is not None:
        read, memory = figures["read_bytes_per_second"], figures["memory_bytes_per_second"]
        rows.append(("weights read", f"{read / 1e9:.1f} GB/s, {read / memory:.0%} of the memory's {memory / 1e9:.1f}"))
    title = (
        f"prompt of {figures['prompt_tokens']} tokens, {figures['new_tokens']} new ones, "
        f"{figures['threads']} threads, median of {figures['rounds']}"
    )
    print_table(("", "measured"), rows, title)
