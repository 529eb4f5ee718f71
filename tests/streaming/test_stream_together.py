"""Several processes that are given the same command share the work, and write the same bytes as one."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fresh_python import run_fresh
from streaming_files import files, quantize

from hqqtensor.streaming import folder_of, plan

SCENARIOS = {"two": 2, "four": 4, "die": 2, "hang": 2}
"""By name, how many workers: in the last two the first one is killed, or stopped, at its third tensor."""

WORKERS = """
    import json, os, signal, sys, time, torch
    from pathlib import Path
    import hqqtensor.cli.quantize
    from hqqtensor import HqqConfig
    from hqqtensor.cli import model_dir, stream
    from hqqtensor.streaming import Source, make_plan, plan, run, work

    dense, place, scenarios = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    plan.BATCH_BYTES = 1024
    torch.set_num_threads(1)
    # On the meta device, which starts no threads that the children would lack: they then have imported what it takes.
    make_plan(model_dir.empty_model_of(Path(dense), torch.bfloat16), Source(Path(dense)), HqqConfig(4))
    real = work.Worker._result

    def worker(what, number):
        taken = []
        def result(self, piece, weight):
            taken.append(piece.unit.name)
            if number == 0 and len(taken) == 3 and what in ("die", "hang"):
                os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            time.sleep(0.02)  # so that every worker gets some
            return real(self, piece, weight)
        work.Worker._result = result
        if what == "hang":
            stream.quantize_files = lambda *args, **named: run.quantize_files(*args, **named, patience=1.5)
        parent = place / what
        sys.stderr, sys.stdout = (open(parent / f"{number}.{kind}", "w") for kind in ("err", "out"))
        command = ["quantize", dense, str(parent / "out"), "--max-shard-size", "20KB", "--workers-join"]
        code = hqqtensor.cli.main(command)
        print(len(taken), file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)

    codes = {}
    for what, count in scenarios.items():
        (place / what).mkdir()
        pids = []
        for number in range(count):
            pids.append(os.fork())
            if pids[-1] == 0:
                worker(what, number)
        codes[what] = [os.waitpid(pid, 0)[1] for pid in pids[what == "hang":]]
        if what == "hang":
            os.kill(pids[0], signal.SIGKILL)
            os.waitpid(pids[0], 0)
    print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def codes(dense: Path, place: Path) -> dict[str, list[int]]:
    """Exit statuses of the workers by scenario (of the one that hangs: of the other)."""
    run = run_fresh(WORKERS, dense, place, json.dumps(SCENARIOS))
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def want(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("want") / "out"
    assert quantize(dense, out, "--max-shard-size", "20KB", "--json") == 0
    return files(out)


def said(folder: Path, kind: str) -> list[str]:
    """What each worker wrote on stderr or stdout, of which ``kind`` is the ending."""
    return [file.read_text() for file in sorted(folder.glob(f"*.{kind}"))]


@pytest.mark.parametrize("scenario", ["two", "four"])
def test_several_processes_give_the_same_bytes_as_one(scenario: str, place: Path, codes, want) -> None:
    folder = place / scenario
    assert codes[scenario] == [0] * SCENARIOS[scenario], said(folder, "err")
    assert files(folder / "out") == want
    taken = [int(error.split()[-1]) for error in said(folder, "err")]
    assert sum(count > 0 for count in taken) > 1 and sum(taken) == 20, taken
    assert sum(bool(text) for text in said(folder, "out")) == 1  # one reports
    assert not folder_of(folder / "out").exists()


def test_the_work_of_a_process_that_dies_is_taken_over(place: Path, codes, want) -> None:
    assert codes["die"] == [signal.SIGKILL, 0], said(place / "die", "err")
    assert files(place / "die" / "out") == want


def test_a_process_that_hangs_ends_the_others_with_a_message(dense: Path, place: Path, codes, want, monkeypatch):
    monkeypatch.setattr(plan, "BATCH_BYTES", 1024)  # as the workers have it
    folder = place / "hang"
    assert codes["hang"] == [1 << 8]
    assert "without finishing; end it, and give the command again" in said(folder, "err")[1]
    assert not (folder / "out").exists()
    assert quantize(dense, folder / "out", "--max-shard-size", "20KB", "--json", "--workers-join") == 0
    assert files(folder / "out") == want


def test_one_that_comes_late_finds_the_model_written(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    assert quantize(dense, out) == 0
    before = files(out)
    capsys.readouterr()
    assert quantize(dense, out) == 0 and files(out) == before
    assert "put into its place by another process" in capsys.readouterr().err
    assert quantize(dense, out, "--bits", 3) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert quantize(dense, out, "--calibrate", "random") == 2


ALIVE = """
    import hqqtensor.cli, sys, time
    from hqqtensor.streaming import work
    work.Worker._result = lambda *args: (print("at work", flush=True), time.sleep(60))
    hqqtensor.cli.main(["quantize", *sys.argv[1:]])
"""


def test_a_second_command_does_not_disturb_the_first(dense: Path, tmp_path: Path, capsys) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ALIVE), str(dense), str(tmp_path / "out"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "at work\n"
        assert quantize(dense, tmp_path / "out") == 2
        assert "--workers-join lets several work together" in capsys.readouterr().err
        assert quantize(dense, tmp_path / "out", "--workers-join") == 2
        assert "was started without --workers-join" in capsys.readouterr().err
        first.kill()
    assert quantize(dense, tmp_path / "out", "--json") == 0
