"""``--calibrate`` and ``--quality`` of ``hqqtensor quantize``."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtensor import HqqConfig
from hqqtensor.cli import model_dir
from hqqtensor.cli.errors import UsageError, from_arguments
from hqqtensor.selection import choose

if TYPE_CHECKING:
    from hqqtensor.calibration.data import Text

NAMES = ("self", "random")
"""What ``--calibrate`` takes besides the name of a file."""


def is_calibrated(args: argparse.Namespace) -> bool:
    """Whether the arguments ask for more than a look at the weights."""
    return args.calibrate is not None or args.quality in ("good", "best")


def check(empty: Any, config: HqqConfig, args: argparse.Namespace) -> "Text | None":
    """UsageError where calibration does not serve the model or the settings; ``empty`` holds no numbers.

    Gives the text to calibrate on where that is a file.
    """
    if not is_calibrated(args):
        return None
    from hqqtensor.calibration.apply import check_settings
    from hqqtensor.calibration.data import Text, writes_text
    from hqqtensor.quantize import QUALITIES

    with from_arguments():
        check_settings(choose(empty, config)[0], QUALITIES[args.quality or "good"])
        if args.calibrate == "self" and not writes_text(empty):
            raise ValueError(
                f"--calibrate self: {type(empty).__name__} cannot write text; use --calibrate random or a text file"
            )
        if args.calibrate != "self" and not isinstance(getattr(empty.config, "vocab_size", None), int):
            raise ValueError(f"{args.model_dir}: the model takes no tokens, so it cannot be calibrated here")
    return None if args.calibrate in (None, *NAMES) else Text(model_dir.read_text(Path(args.calibrate)), args.calibrate)


def arguments_of_quantize(
    model: Any, text: "Text | None", tokenizer_dir: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """What ``quantize_`` is to be called with besides the settings; says on stderr what it calibrates on.

    text: what ``check`` gave.
    """
    if not is_calibrated(args):
        return {}
    from hqqtensor.calibration.data import MANY_TOKENS, TOKENS, writes_text

    source = args.calibrate or ("self" if writes_text(model) else "random")
    if not args.json:
        what = {"self": "text that the model writes", "random": "random tokens"}.get(source, source)
        tokens = MANY_TOKENS if args.quality == "best" else TOKENS
        print(f"calibrating on about {tokens} tokens: {what}", file=sys.stderr)
    tokenizer = None if text is None else model_dir.open_tokenizer(tokenizer_dir)
    return {"calibration": text or source, "quality": args.quality or "good", "tokenizer": tokenizer}


@contextlib.contextmanager
def resumable(out: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The argument ``resume`` of ``quantize_`` for a run that writes ``out``, where it calibrates.

    What is finished is kept beside ``out`` until the block ends without an error. Then it is removed.
    """
    if not is_calibrated(args):
        yield {}
        return
    from hqqtensor.calibration.resume import ResumeFolder
    from hqqtensor.run_record import ResumeError

    folder = ResumeFolder(out.with_name(f"{out.name}.unfinished"))
    if folder.is_begun and not args.json:
        print(f"going on with what an interrupted run left in {folder.path}", file=sys.stderr)
    try:
        yield {"resume": folder}
    except ResumeError as error:
        raise UsageError(str(error)) from error
    except BaseException:
        if folder.is_begun:
            print(f"what is finished is kept in {folder.path}: the same command goes on from there", file=sys.stderr)
        raise
    with contextlib.suppress(OSError):  # what is left does no harm; or someone has put something there
        folder.empty()
        folder.path.rmdir()
