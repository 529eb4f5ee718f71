"""What the commands print: JSON, aligned tables, progress."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hqqtensor.diagnostics.table import text_table

Progress = Callable[[int, int, str], None]


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout, drawn by rich on a terminal that has it, else aligned with blanks.

    The first column is aligned left, the others right. Every row has as many cells as ``header``.
    """
    if sys.stdout.isatty() and _has_rich():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    if title:
        print(title)
    print(text_table(header, rows))


@contextmanager
def progress_on_stderr(title: str, wanted: bool) -> Iterator[Progress | None]:
    """A ``progress(done, total, name)`` callback that draws on stderr; None where it is not ``wanted``.

    A bar on a terminal that has rich, else a line at every tenth of the work.
    """
    if not wanted:
        yield None
    elif sys.stderr.isatty() and _has_rich():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, name: bar.update(task, completed=done, total=total)
    else:
        yield _plain_progress(title)


def _plain_progress(title: str) -> Progress:
    shown = 0

    def report(done: int, total: int, name: str) -> None:
        nonlocal shown
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            print(f"{title}: {100 * done // total}% ({name})", file=sys.stderr, flush=True)

    return report


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True
