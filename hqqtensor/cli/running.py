"""A language model made ready to write text for a command, and the timing of what it writes."""

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hqqtensor import HqqConfig, quantize_
from hqqtensor.cli import model_dir
from hqqtensor.cli.errors import UsageError, from_arguments
from hqqtensor.cli.output import progress_on_stderr
from hqqtensor.selection import check_shapes, choose


def open_to_write(directory: Path, bits: int | None, quiet: bool, mmap: bool = True) -> Any:
    """The causal language model of a directory, ready for ``generate()``, in eval mode on the CPU.

    bits: what a dense model is quantized to; None leaves it dense. quiet: no progress. mmap: as
    in ``load``, for a quantized directory. One line on stderr says why
    where ``prepare_for_generation_`` does not serve the model. UsageError where the directory or the bits do not fit.
    """
    entry = model_dir.quantization_of(directory)
    if entry is not None and bits is not None:
        raise UsageError(f"{directory} is quantized already: --bits is for a dense DIR")
    with from_arguments():
        config = None if bits is None else HqqConfig(bits, embedding_nbits=8)
    empty = check_writes(directory)
    if config is not None:
        with from_arguments():
            check_shapes(choose(empty, config)[0])
    if entry is not None:
        model: Any = model_dir.open_quantized(directory, mmap)
    else:
        model = model_dir.open_dense(directory)
        if config is not None:
            with progress_on_stderr("quantizing", not quiet) as progress:
                quantize_(model, config, progress=progress)
    make_fast(model)
    return model


def check_writes(directory: Path) -> Any:
    """UsageError where the model of a directory is no causal language model; else the model without its numbers."""
    model_dir.read_config(directory)
    empty: Any = model_dir.empty_model_of(directory)
    if not empty.can_generate() or getattr(empty.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{directory}: {type(empty).__name__} is not a causal language model (no language-model head that predicts "
            "the next token)"
        )
    return empty


def make_fast(model: Any) -> None:
    """``prepare_for_generation_``, or one line on stderr that says why transformers' own code runs."""
    from hqqtensor import prepare_for_generation_  # imports transformers, whose absence has a message by now

    try:
        prepare_for_generation_(model)
    except ValueError as error:
        print(f"transformers' own decoding, which is slower: {error}", file=sys.stderr)


def sampling(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``generate()`` for ``--max-tokens`` and ``--temperature``; sets the seed of ``--seed``."""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    settings: dict[str, Any] = {"max_new_tokens": args.max_tokens}
    if args.temperature == 0:
        settings |= greedy()
    elif args.temperature is not None:
        settings |= {"do_sample": True, "temperature": args.temperature}
    if model.generation_config.pad_token_id is None:  # generate() would say so for each answer
        end = model.generation_config.eos_token_id
        settings["pad_token_id"] = end[0] if isinstance(end, list) else end
    return settings


def greedy() -> dict[str, Any]:
    """Arguments of ``generate()`` that take the likeliest token, without a warning of those that have no meaning."""
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def longest_context(model: Any) -> int | None:
    """Positions that the model was trained for; None where its config does not say."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


@dataclass(frozen=True)
class Timing:
    """Tokens of prompt and answer, seconds to the first token, and seconds of the tokens after it."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for a single token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        rate = self.tokens_per_second
        speed = "" if rate is None else f", {rate:.1f} tokens a second"
        return (
            f"{self.prompt_tokens} tokens of prompt, first token after {self.first_token_seconds:.2f} s; "
            f"{self.new_tokens} new tokens{speed}"
        )


class TimedStreamer:
    """What ``generate()`` takes as ``streamer``: passes tokens on to another one, if any, and notes when they came."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.prompt_tokens = 0
        self.times: list[float] = []
        self.started = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called with the prompt ``[1, tokens]`` first, then with each new token."""
        if self.prompt_tokens == 0:
            self.prompt_tokens = value.numel()
        else:
            self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """Called after the last token."""
        if self.inner is not None:
            self.inner.end()

    def timing(self) -> Timing:
        """What has come so far."""
        if not self.times:
            return Timing(self.prompt_tokens, 0, 0.0, 0.0)
        first, last = self.times[0], self.times[-1]
        return Timing(self.prompt_tokens, len(self.times), first - self.started, last - first)
