"""Progress in lines: the share of the work that is done, and the time that is left."""

import sys
import types
from typing import Any

import pytest

from hqqtensor.cli import output
from hqqtensor.quantize import PHASES


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(output, "time", clock)
    return clock


def lines(capsys: Any, clock: Any, calls: list[tuple[float, int, int, str]]) -> list[str]:
    with output.progress_on_stderr("quantizing", True) as progress:
        for clock.now, *call in calls:
            assert progress is not None
            progress(*call)
    return capsys.readouterr().err.splitlines()


def test_a_line_at_every_tenth_says_what_is_done_and_left(capsys: Any, clock: Any) -> None:
    calls = [(float(i), i, 100, f"layer{i}") for i in range(1, 101)]
    printed = lines(capsys, clock, calls)
    assert len(printed) == 10
    assert printed[0] == "quantizing layer10: 10%, about 2 min left"
    assert printed[4] == "quantizing layer50: 50%, about 50 s left" and printed[-1] == "quantizing layer100: 100%"


def test_a_line_comes_every_minute_where_a_tenth_takes_longer(capsys: Any, clock: Any) -> None:
    printed = lines(capsys, clock, [(30.0 * i, i, 1000, "a") for i in range(1, 7)])
    assert printed == ["quantizing a: 0%, about 8 h 19 min left", "quantizing a: 0%, about 8 h 18 min left",
                       "quantizing a: 0%, about 8 h 17 min left"]  # fmt: skip


def test_phases_begin_anew_and_have_names_of_their_own(capsys: Any, clock: Any) -> None:
    calls = [
        (1.0, 1, 2, "writing text"),
        (11.0, 2, 2, "writing text"),
        (12.0, 1, 2, "calibrating"),
        (13.0, 10, 50, "a"),
    ]
    assert lines(capsys, clock, calls) == [
        "writing text: 50%", "writing text: 100%", "calibrating: 50%", "quantizing a: 20%",
    ]  # fmt: skip


def test_what_was_finished_before_says_nothing_of_the_speed(capsys: Any, clock: Any) -> None:
    calls = [(0.0, 500, 1000, "finished before"), (100.0, 600, 1000, "a")]
    assert lines(capsys, clock, calls)[-1] == "quantizing a: 60%, about 7 min left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, ""), (5, ", about 5 s left"), (100, ", about 2 min left"), (3 * 3600 + 600, ", about 3 h 10 min left")],
)
def test_time_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert output.time_left(seconds) == text


def test_nothing_is_printed_where_nobody_wants_it(capsys: Any) -> None:
    with output.progress_on_stderr("quantizing", False) as progress:
        assert progress is None


def test_a_terminal_has_a_bar_that_says_what_is_at_work(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name in ("calibrating", "layer7"):
        with output.progress_on_stderr("quantizing", True) as progress:
            assert progress is not None
            progress(1, 2, "calibrating")
            progress(50, 100, name)
        assert (name if name in PHASES else f"quantizing {name}") in capsys.readouterr().err
