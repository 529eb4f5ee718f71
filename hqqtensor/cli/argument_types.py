"""What the values of options are made of, and options that several commands share. Nothing here imports torch."""

import argparse
from pathlib import Path


def number_or_none(text: str) -> int | None:
    """A number, or None for "none"."""
    return None if text.lower() == "none" else int(text)


def group_size(text: str) -> int | str | None:
    """A number, "auto", or None for "none": one group a row."""
    return "auto" if text.lower() == "auto" else number_or_none(text)


def embedding_bits(text: str) -> int | str | None:
    """A number, "auto", or None for "none"."""
    return group_size(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def temperature(text: str) -> float:
    """A finite number from 0 on."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """``--json``; ``what``: that which the document holds."""
    parser.add_argument("--json", action="store_true", help=f"{what} as one JSON document on stdout")


def add_windows(parser: argparse.ArgumentParser, most: int | None = None) -> None:
    """How a text is cut for comparing models: ``--context`` and ``--max-tokens``."""
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens a window (default: 256)")
    parser.add_argument(
        "--max-tokens", type=int, default=most, metavar="N",
        help=f"use at most N tokens of the text (default: {most or 'all'})",
    )  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """DIR of a language model, and ``--bits`` to quantize a dense one after it was read."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="model directory, quantized by hqqtensor or dense")
    parser.add_argument(
        "--bits", type=int, metavar="N",
        help="for a dense DIR: quantize it in memory to N bits first, 1 to 8 (default: run it dense)",
    )  # fmt: skip
    add_mmap(parser)


def add_mmap(parser: argparse.ArgumentParser) -> None:
    """``--no-mmap``."""
    parser.add_argument(
        "--no-mmap", dest="mmap", action="store_false",
        help="read quantized files into memory, so that they may change or go away meanwhile (default: map them)",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser, tokens: int) -> None:
    """How text is written: ``--max-tokens``, ``--temperature``, ``--seed``."""
    add = parser.add_argument
    add("--max-tokens", type=positive, default=tokens, metavar="N", help=f"longest answer (default: {tokens} tokens)")
    add(
        "--temperature", type=temperature, metavar="T",
        help="how freely tokens are drawn; 0 always takes the likeliest (default: the model's generation_config.json)",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="the same answer in each run (default: another one)")
