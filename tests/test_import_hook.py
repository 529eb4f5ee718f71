import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hqqtensor.import_hook import when_imported


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Writes a module of this test into a folder that is searched for modules; unloads all of them at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name: str, text: str = "value = 1\n") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_actions_run_after_the_module_in_their_order_and_nothing_is_imported(write) -> None:
    name, seen = write("hooked"), []
    when_imported(name, lambda: seen.append(sys.modules[name].value))
    when_imported(name, lambda: seen.append("second"))
    assert name not in sys.modules and seen == []
    module = importlib.import_module(name)
    assert seen == [1, "second"]
    # The module has the loader that it would have without us, as inspect and pickle expect.
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    when_imported(name, lambda: seen.append("now"))
    assert seen[2:] == ["now"]
    importlib.reload(module)
    assert seen[3:] == [1, "second", "now"]


def test_asking_for_a_spec_uses_no_action_up(write) -> None:
    name, seen = write("asked"), []
    when_imported(name, lambda: seen.append("ran"))
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None and seen == []
    assert spec.loader.get_source(name) == "value = 1\n" and not spec.loader.is_package(name)
    importlib.import_module(name)
    assert seen == ["ran"]


def test_a_module_that_is_not_there_is_missing_as_before() -> None:
    when_imported("no_such_module_at_all", lambda: None)
    assert importlib.util.find_spec("no_such_module_at_all") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_at_all")


def test_an_import_that_fails_is_tried_again_with_its_actions(write, tmp_path: Path) -> None:
    name, seen = write("broken", "raise RuntimeError('not today')\n"), []
    when_imported(name, lambda: seen.append("ran"))
    with pytest.raises(RuntimeError, match="not today"):
        importlib.import_module(name)
    assert seen == []
    write(name, "value = 'longer than before'\n")
    importlib.import_module(name)
    assert seen == ["ran"]


def test_an_error_of_an_action_is_the_importers_and_comes_again(write) -> None:
    name, answers = write("refused"), [ValueError("no"), None]

    def action() -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    when_imported(name, action)
    with pytest.raises(ValueError, match="no"):
        importlib.import_module(name)
    assert name not in sys.modules
    importlib.import_module(name)
    assert answers == []


def test_a_half_imported_module_is_left_alone_until_it_is_whole(write) -> None:
    seen: list[object] = []
    sys.modules["_seen_by_hook"] = seen  # type: ignore[assignment]
    half = write(
        "half",
        """
import sys
from hqqtensor.import_hook import when_imported
seen = sys.modules["_seen_by_hook"]
when_imported("half", lambda: seen.append(hasattr(sys.modules["half"], "last")))
assert seen == []
last = 1
""",
    )
    later = write("later")
    try:
        importlib.import_module(half)
        importlib.import_module(later)
        assert seen == [True]
    finally:
        del sys.modules["_seen_by_hook"]


def test_threads_that_import_while_actions_are_added_miss_none(write) -> None:
    names = [write(f"threaded_{i}", "import time\ntime.sleep(0.002)\n") for i in range(40)]
    ran: list[str] = []
    errors: list[BaseException] = []
    start = threading.Barrier(3)

    def importer(order: list[str]) -> None:
        try:
            start.wait()
            for name in order:
                importlib.import_module(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=importer, args=(order,)) for order in (names, names[::-1])]
    for thread in threads:
        thread.start()
    start.wait()
    for name in names:
        when_imported(name, lambda name=name: ran.append(name))  # type: ignore[misc]
    for thread in threads:
        thread.join()
    importlib.import_module(write("threaded_last"))  # what was half imported when its action came runs here
    assert not errors and set(ran) == set(names)
