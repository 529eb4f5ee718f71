"""What the commands print: JSON, aligned tables, progress."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hqqtensor.diagnostics.table import text_table
from hqqtensor.quantize import PHASES

Progress = Callable[[int, int, str], None]

SECONDS = 60
"""Longest time between two lines of progress, where there is any."""


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
def progress_on_stderr(
    title: str, wanted: bool, unit: str = "", note: Callable[[], str] = str
) -> Iterator[Progress | None]:
    """A ``progress(done, total, name)`` callback that draws on stderr; None where it is not ``wanted``.

    unit: of ``done``, such as "weights", if the rate is to be shown. note(): more to show. Neither is for ``PHASES``.
    A bar on a terminal that has rich, else a line at every tenth of the work and at least every minute. Each phase of
    ``PHASES`` begins anew, with a time left of its own.
    """
    if not wanted:
        yield None
    elif sys.stderr.isatty() and _has_rich():
        from rich.console import Console
        from rich.progress import Progress as Bar
        from rich.progress import TextColumn

        columns = [*Bar.get_default_columns(), TextColumn("{task.fields[more]}")]
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, more="")
            phase = None

            def draw(done: int, total: int, name: str) -> None:
                nonlocal phase
                if phase != _phase(title, name):
                    phase = _phase(title, name)
                    bar.reset(task, total=total)
                speed = bar.tasks[0].speed
                more = [_rate(speed, unit) if unit and speed else "", note()] if name not in PHASES else []
                description = _label(title, name)
                shown = ", ".join(filter(None, more))
                bar.update(task, completed=done, total=total, description=description, more=shown)

            yield draw
    else:
        yield _Lines(title, unit, note).report


def _phase(title: str, name: str) -> str:
    return name if name in PHASES else title


def _label(title: str, name: str) -> str:
    return name if name in PHASES else f"{title} {name}"


class _Lines:
    """Progress in lines of text: what is at work, its share of the phase, and the time left by the speed so far."""

    def __init__(self, title: str, unit: str = "", note: Callable[[], str] = str) -> None:
        self.title, self.unit, self.note, self.phase, self.tenth = title, unit, note, "", 0
        self.began = self.shown = time.monotonic()
        self.first_done = 0

    def report(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        if self.phase != _phase(self.title, name):
            # What is done at the first call, as by a run that was interrupted, says nothing of the speed.
            self.phase, self.tenth, self.began, self.first_done = _phase(self.title, name), 0, now, done
        tenth = 10 * done // total
        if tenth > self.tenth or now - self.shown >= SECONDS:
            self.tenth, self.shown = tenth, now
            speed = (done - self.first_done) / (now - self.began) if now > self.began else 0
            left = (total - done) / speed if speed else 0
            more = [_rate(speed, self.unit) if self.unit and speed else "", self.note()] if name not in PHASES else []
            line = ", ".join([f"{_label(self.title, name)}: {100 * done // total}%", *filter(None, more)])
            print(f"{line}{time_left(left)}", file=sys.stderr, flush=True)


def _rate(speed: float, unit: str) -> str:
    return f"{speed / 1e6:.1f} M {unit}/s"


def time_left(seconds: float) -> str:
    """``", about 5 min left"``; nothing for less than a second."""
    return "" if seconds < 1 else f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words, such as "40 s", "12 min" or "2 h 5 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True
