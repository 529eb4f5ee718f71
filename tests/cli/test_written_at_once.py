"""A model directory is replaced wholly or not at all, whatever stops it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from fresh_python import run_fresh

from hqqtensor.cli import model_dir
from hqqtensor.cli.errors import UsageError
from hqqtensor.cli.model_dir import check_output, written_at_once
from hqqtensor.serialization import scratch


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def write(folder: Path, what: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(what)


def held(folder: Path) -> str:
    """What a whole model directory was written with; asserts that it is whole."""
    texts = [(folder / name).read_text() for name in ("config.json", "model.safetensors")]
    assert texts[0] == texts[1] and len(list(folder.iterdir())) == 2
    return texts[0]


def replace(out: Path) -> None:
    with written_at_once(out) as work:
        write(work, "new")


def stop_at(patch: pytest.MonkeyPatch, step: int, after: bool, error: type[BaseException]) -> list[str]:
    """Let the ``step``-th rename, mkdir or rmtree raise, before or ``after`` it is done; what was called."""
    calls: list[str] = []

    def stopping(real, name):
        def call(*args, **kwargs):
            calls.append(name)
            stops = len(calls) == step
            if stops and not after:
                raise error("stopped")
            result = real(*args, **kwargs)
            if stops:
                raise error("stopped")
            return result

        return call

    patch.setattr(Path, "rename", stopping(Path.rename, "rename"))
    patch.setattr(Path, "mkdir", stopping(Path.mkdir, "mkdir"))
    patch.setattr(shutil, "rmtree", stopping(shutil.rmtree, "rmtree"))
    patch.setattr(scratch.tempfile, "mkdtemp", stopping(scratch.tempfile.mkdtemp, "mkdtemp"))
    return calls


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_fault_at_any_step_leaves_one_model_whole(tmp_path, monkeypatch, capsys, there, after, error) -> None:
    for step in range(1, 20):
        parent = tmp_path / str(step)
        out = parent / "model"
        if there:
            out.mkdir(parents=True)
            write(out, "old")
        with monkeypatch.context() as patch:
            calls = stop_at(patch, step, after, error)
            try:
                replace(out)
            except error:
                done = False
            else:
                done = True
        if there or out.exists():
            assert held(out) in ("old", "new"), calls
        if done:
            break
        replace(out)  # and the next run puts in order what is left
        assert held(out) == "new" and os.listdir(parent) == ["model"], calls
    assert done and held(out) == "new" and len(calls) == (6 if there else 5)


def test_where_the_old_model_cannot_be_put_back_it_is_kept_for_the_next_run(tmp_path, monkeypatch, capsys) -> None:
    """Both the second rename and the one that undoes the first fail."""
    out = tmp_path / "model"
    out.mkdir()
    write(out, "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == out:
            raise PermissionError(f"no writing to {target}")
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="no writing"):
        patch.setattr(Path, "rename", rename)
        replace(out)
    assert not out.exists()
    check_output(out, tmp_path / "source", overwrite=True)
    assert held(out) == "old" and os.listdir(tmp_path) == ["model"]
    assert "put the model that was here back" in capsys.readouterr().err


def test_a_block_that_raises_leaves_the_old_model_and_nothing_beside_it(tmp_path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    write(out, "old")
    with pytest.raises(Stopped), written_at_once(out) as work:
        (work / "config.json").write_text("half")
        raise Stopped
    assert held(out) == "old" and os.listdir(tmp_path) == ["model"]


KILLED = """
    import os, shutil, sys
    from pathlib import Path
    from hqqtensor.cli import model_dir
    from killing import kill_at

    out = Path(sys.argv[1]) / "model"

    def replace():
        # The calls of the system below Path and shutil: the removal of a directory has many.
        kill_at(step, *((os, name) for name in ("rename", "mkdir", "rmdir", "unlink")))
        with model_dir.written_at_once(out) as work:
            for name in ("config.json", "model.safetensors"):
                (work / name).write_text("new")

    for step in range(1, 40):
        shutil.rmtree(out.parent)
        out.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (out / name).write_text("old")
        pid = os.fork()
        if pid == 0:
            replace()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        between = not out.exists()
        model_dir.check_output(out, out.parent.parent / "source", overwrite=True)  # the next run
        texts = {(out / name).read_text() for name in ("config.json", "model.safetensors")}
        print(step, os.WTERMSIG(status), between, *texts, *sorted(set(os.listdir(out.parent)) - {"model"}))
        if status == 0:
            break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_next_run_restores_what_a_killed_one_left(tmp_path) -> None:
    (tmp_path / "parent").mkdir()
    run = run_fresh(KILLED, tmp_path / "parent")
    rows = [line.split() for line in run.stdout.splitlines()]
    assert run.returncode == 0 and len(rows) > 6, run.stdout + run.stderr
    assert all(row[1] == str(int(signal.SIGKILL)) for row in rows[:-1]) and rows[-1][1] == "0"
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)  # first "old", then "new"
    assert all(len(row) == 4 for row in rows), run.stdout  # nothing is left beside the model
    assert [row[2] for row in rows].count("True") == 1  # one kill fell between the two renames
    assert run.stderr.count("put the model that was here back") == 1
    assert "removed what an interrupted run left" in run.stderr


def test_a_run_that_is_alive_is_left_alone(tmp_path, capsys) -> None:
    out = tmp_path / "model"
    with written_at_once(out) as first:
        write(first, "first")
        check_output(out, tmp_path / "source", overwrite=False)
        replace(out)
        assert held(out) == "new" and first.is_dir()
    assert held(out) == "first" and os.listdir(tmp_path) == ["model"] and capsys.readouterr().err == ""


def leave_between_the_renames(out: Path) -> Path:
    """As a run that was killed there leaves it."""
    work = out.parent / f".{out.name}.hqqtensor-abcd1234"
    for name in ("old", "new"):
        (work / name).mkdir(parents=True)
        write(work / name, name)
    return work


@pytest.mark.parametrize("locks", [True, False])
def test_without_locks_only_a_missing_model_is_restored(tmp_path, monkeypatch, capsys, locks) -> None:
    if not locks:
        monkeypatch.setattr(scratch, "fcntl", None)
    out, unfinished = tmp_path / "model", tmp_path / ".model.hqqtensor-efgh5678"
    work = leave_between_the_renames(out)
    (unfinished / "new").mkdir(parents=True)
    with pytest.raises(UsageError, match="is not empty; --overwrite replaces it"):
        check_output(out, tmp_path / "source", overwrite=False)
    assert held(out) == "old" and not work.exists() and unfinished.exists() is not locks
    assert f"{out}: put the model that was here back" in capsys.readouterr().err


def test_reading_a_model_restores_it_first(tmp_path, capsys) -> None:
    out = tmp_path / "model"
    work = leave_between_the_renames(out)
    (work / "old" / "config.json").write_text('{"is": "old"}')
    assert model_dir.read_config(out) == {"is": "old"} and not work.exists()
    assert f"{out}: put the model that was here back" in capsys.readouterr().err


def test_a_model_that_was_written_since_is_not_replaced(tmp_path, capsys) -> None:
    out = tmp_path / "model"
    work = leave_between_the_renames(out)
    out.mkdir()
    write(out, "since")
    check_output(out, tmp_path / "source", overwrite=True)
    assert held(out) == "since" and held(work / "old") == "old"
    assert f"the model that an interrupted run was to replace is in {work / 'old'}" in capsys.readouterr().err


def test_directories_of_other_names_are_left_alone(tmp_path) -> None:
    others = [
        tmp_path / name for name in (".model.backup", ".model.hqqtensor-x.hqqtensor-abcd", ".models.hqqtensor-abcd")
    ]
    for other in others:
        (other / "new").mkdir(parents=True)
    replace(tmp_path / "model")
    assert all((other / "new").is_dir() for other in others)
