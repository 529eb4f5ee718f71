"""The ``hqqtensor`` command."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from hqqtensor.cli import convert, env, evaluate, inspect, quantize
from hqqtensor.cli.output import UsageError

_COMMANDS = {
    "quantize": (quantize, "quantize a Hugging Face model directory"),
    "convert": (convert, "read an hqq checkpoint, or write one"),
    "inspect": (inspect, "list what a checkpoint holds"),
    "eval": (evaluate, "perplexity and agreement before and after"),
    "env": (env, "versions, processor features, kernels"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hqqtensor", description="Half-quadratic quantization of models to 1 to 8 bits.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, about) in _COMMANDS.items():
        own = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the process's arguments) names and return its exit code.

    0: done. 1: the work failed. 2: wrong arguments. An error is one line on stderr; HQQTENSOR_TRACEBACK=1 adds
    the traceback.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"hqqtensor {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("HQQTENSOR_TRACEBACK") == "1":
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hqqtensor {args.command}: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
