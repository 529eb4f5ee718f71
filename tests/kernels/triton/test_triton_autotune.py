"""The file of timed tiles: what is read is checked, and processes that write at once lose nothing."""

import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hqqtensor.kernels.triton import autotune
from hqqtensor.kernels.triton.config import Device, Plan, Problem, Tile, plan

DEVICE = Device("sm_90", 132)
GOOD = asdict(Tile(8, 64, 1, 3, 2))
PROBLEM = Problem(1, 4096, 4096, 1, 4, 64, 1, 2)


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    place = tmp_path / "deep" / "triton.json"
    monkeypatch.setenv("HQQTENSOR_AUTOTUNE", "1")
    monkeypatch.setenv("HQQTENSOR_AUTOTUNE_CACHE", str(place))
    monkeypatch.setattr(autotune, "_remembered", None)
    return place


def pick(wanted: Tile, seen: list[Tile]):
    """A timer by which ``wanted`` wins; each call also notes what was run."""

    def bench(call) -> float:
        call()
        return 1.0 if seen[-1] == wanted else 2.0

    return bench


def choose(seen: list[Tile], wanted: Tile) -> Plan | None:
    return autotune.choose(PROBLEM, DEVICE, "fp16", 0, lambda p: seen.append(p.tile), pick(wanted, seen))


def test_off_unless_asked_for(monkeypatch) -> None:
    monkeypatch.delenv("HQQTENSOR_AUTOTUNE", raising=False)
    assert autotune.choose(PROBLEM, DEVICE, "fp16", 0, lambda p: pytest.fail("nothing is run")) is None


def test_the_fastest_tile_is_kept_and_not_timed_again(file: Path, monkeypatch) -> None:
    seen: list[Tile] = []
    wanted = autotune.tiles(PROBLEM, DEVICE)[5]
    wanted = plan(PROBLEM, DEVICE, wanted).tile
    found = choose(seen, wanted)
    assert found is not None and found.tile == wanted and len(seen) > 5
    assert plan(PROBLEM, DEVICE).tile in seen
    count = len(seen)
    assert choose(seen, wanted) == found and len(seen) == count
    monkeypatch.setattr(autotune, "_remembered", None)  # as a new process
    assert choose(seen, wanted) == found and len(seen) == count


def test_another_shape_or_version_is_another_entry(monkeypatch) -> None:
    def key(**changes) -> str:
        return autotune.key(Problem(**{**asdict(PROBLEM), **changes}), DEVICE, "fp16", 0)

    assert key() != key(N=1024) and key() != key(nbits=3) and key(M=5) == key(M=8) != key(M=9)
    assert len({key(), key(meta=(8, 8)), key(meta=(4, 8)), key(meta=(4, 4))}) == 4
    before = key()
    for module, name, value in (
        (autotune.triton, "__version__", "0.0.0"), (autotune.torch, "__version__", "0"), (autotune, "FILE_VERSION", 0),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            assert key() != before
    assert key() == before


def test_a_write_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch) -> None:
    first = {"a": Tile(8, 64, 1, 3, 2)}
    autotune.write(file, first)

    def half(content, out, **_) -> None:
        out.write('{"a": {"blo')
        raise OSError("disk full")

    monkeypatch.setattr(autotune.json, "dump", half)
    with pytest.raises(OSError, match="disk full"):
        autotune.write(file, {"b": Tile(16, 64, 1, 3, 2)})
    assert autotune.read(file) == first
    assert sorted(p.name for p in file.parent.iterdir()) == ["triton.json", "triton.json.lock"]


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 1', "[" * 100_000])
def test_a_broken_file_starts_anew(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="starts anew"):
        assert autotune.read(file) == {}
    with pytest.warns(UserWarning):
        autotune.write(file, {"a": Tile(8, 64, 1, 3, 2)})
    assert autotune.read(file) == {"a": Tile(8, 64, 1, 3, 2)}


@pytest.mark.parametrize(
    "entry",
    [{}, {"block_m": 8}, 5, None, {**GOOD, "warps": 3}, {**GOOD, "more": 1}, {**GOOD, "block_n": "64"},
     {**GOOD, "split_k": 10**9}],
)  # fmt: skip
def test_bad_entries_are_left_out_and_named(file: Path, entry: object) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"bad": entry, "good": asdict(Tile(8, 64, 1, 3, 2))}))
    with pytest.warns(UserWarning, match="'bad'"):
        assert autotune.read(file) == {"good": Tile(8, 64, 1, 3, 2)}


def _add(file: Path, worker: int) -> None:
    for i in range(5):
        autotune.write(file, {f"{worker}-{i}": Tile(8, 64, 1, 3, 2)})


def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(file, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert set(autotune.read(file)) == {f"{n}-{i}" for n in range(4) for i in range(5)}
    assert [p.name for p in file.parent.iterdir() if p.suffix not in (".json", ".lock")] == []
