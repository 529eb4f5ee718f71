"""The arguments of the commands that run a model or tell of one. Nothing here imports torch."""

import argparse
from pathlib import Path

from hqqtensor.cli.argument_types import add_json, add_model, add_sampling, add_windows, positive

SHELLS = ("bash", "zsh", "fish")


def add_chat(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor chat``."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")
    add_sampling(parser, 512)
    add_json(parser, "the conversation")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor generate``."""
    add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="what to go on from; '-' reads stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt to a chat model as a question")
    add_sampling(parser, 128)
    add_json(parser, "text and speed")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor serve``."""
    add_model(parser)
    add = parser.add_argument
    add("--host", default="localhost", metavar="NAME", help="address to listen on (default: localhost)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on, 0 for any free one (default: 8000)")
    add("--name", metavar="NAME", help="the model's name in requests (default: the directory's)")
    add(
        "--max-requests", type=positive, default=256, metavar="N",
        help="requests that are answered or wait at once; more get status 503 (default: 256)",
    )  # fmt: skip
    add_json(parser, "address and model")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor bench``."""
    add_model(parser)
    add = parser.add_argument
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="tokens of the prompt (default: 128)")
    add("--new-tokens", type=positive, default=64, metavar="N", help="tokens to write (default: 64)")
    add("--rounds", type=positive, default=3, metavar="N", help="runs after a first one; medians count (default: 3)")
    add_json(parser, "the figures")


def add_recommend(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor recommend``."""
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="directory of a dense model: config.json and safetensors")
    add(
        "--memory", metavar="SIZE",
        help="what weights and cache may take, such as 8GiB (default: what is free on this machine)",
    )  # fmt: skip
    add("--context", type=positive, metavar="N", help="tokens that the cache is to hold (default: 4096 at most)")
    add("--speed", action="store_true", help="take the fastest setting of fair quality or better, not the best one")
    add("--seconds", type=float, default=10.0, metavar="N", help="time for measuring; 0 for none (default: 10)")
    add_json(parser, "the settings")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor compare``."""
    add = parser.add_argument
    add("a", metavar="A", type=Path, help="model directory to compare with, dense or quantized")
    add("b", metavar="B", type=Path, help="model directory, dense or quantized")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    add_windows(parser)
    add_json(parser, "the figures")


def add_card(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor card``."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="directory of a quantized model")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    add_json(parser, "the card and what it says")


def add_report(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor report``."""
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="directory of a quantized model")
    add("-o", "--output", type=Path, metavar="FILE", help="the page to write (default: NAME-report.html, here)")
    add("--original", type=Path, metavar="DIR", help="the dense model, for errors by layer (default: none)")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to compare both models on; needs --original")
    add("--sensitivity", type=Path, metavar="FILE", help="the search's measurements, to draw (default: none)")
    add(
        "-p", "--prompt", metavar="TEXT",
        help="let the model (and the original) go on from this (default: the text's first words)",
    )  # fmt: skip
    add_windows(parser, 4096)
    add_json(parser, "the page's figures")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """``hqqtensor completion``."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete commands and options in")
    add_json(parser, "the script")
