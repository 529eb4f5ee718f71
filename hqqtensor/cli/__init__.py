"""The ``hqqtensor`` command.

The arguments are apart from the code that runs, which is imported once a command does run: help needs no torch.
"""

import importlib
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence

from hqqtensor.cli.arguments import make_parser
from hqqtensor.cli.errors import UsageError

_MODULES = {"eval": "evaluate"}  # where the module's name is not the command's
_WITHOUT_TORCH = ("completion",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the process's arguments) names and return its exit code.

    0: done. 1: the work failed. 2: the command cannot run as written. 130: interrupted. An error is one line on
    stderr; HQQTENSOR_TRACEBACK=1 adds the traceback.
    """
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        if args.command in _WITHOUT_TORCH:
            return _run(args)
        from hqqtensor.registration import register, without_torchao_notes

        register()
        with without_torchao_notes():  # transformers imports more of torchao later
            return _run(args)
    except BrokenPipeError:  # the reader has enough, such as `head`; Python's last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"hqqtensor {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("HQQTENSOR_TRACEBACK") == "1":
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hqqtensor {args.command}: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(args: Namespace) -> int:
    """Import the module of the command and run it."""
    code = importlib.import_module(f"hqqtensor.cli.{_MODULES.get(args.command, args.command)}").run(args)
    sys.stdout.flush()
    return code
