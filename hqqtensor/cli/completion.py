"""``hqqtensor completion``: a script for a shell, made by shtab from the arguments."""

import argparse
import json
from typing import Any

from hqqtensor.cli.arguments import make_parser
from hqqtensor.cli.errors import CommandError


def run(args: argparse.Namespace) -> int:
    """Print the script of the shell that was named."""
    try:
        import shtab
    except ImportError as error:
        raise CommandError(f"this command needs shtab (pip install 'hqqtensor[cli]'): {error}") from error
    parser = make_parser()
    complete_files(parser)
    script = shtab.complete(parser, shell=args.shell)
    print(json.dumps({"shell": args.shell, "script": script}, indent=2) if args.json else script)
    return 0


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Say of every argument that is a path that files and directories complete it."""
    import shtab

    for action in parser._actions:
        choices: Any = action.choices
        if isinstance(choices, dict):  # the commands
            for command in choices.values():
                complete_files(command)
        elif action.metavar in ("FILE", "DIR", "MODEL_DIR", "OUT_DIR", "SRC", "DST", "A", "B"):
            action.complete = shtab.FILE if action.metavar in ("FILE", "SRC") else shtab.DIRECTORY  # type: ignore
