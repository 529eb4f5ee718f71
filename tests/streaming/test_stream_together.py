"""Several processes that are given the same command share the work, and write the same bytes as one."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from killing import run_script
from streaming_files import files, quantize

from hqqtensor.streaming import folder_of

WORKERS = """
    import os, sys, time, torch
    from pathlib import Path
    import hqqtensor.cli, hqqtensor.cli.quantize, transformers
    from hqqtensor.streaming import plan, run, work

    dense, parent, count, what = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    plan.BATCH_BYTES = 1024
    torch.set_num_threads(1)
    transformers.LlamaForCausalLM  # imported once, here
    real = work.Worker._result

    def worker(number):
        taken = []
        def result(self, piece, weight):
            taken.append(piece.unit.name)
            if number == 0 and len(taken) == 3 and what != "work":
                import signal
                os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            time.sleep(0.01)  # so that every worker gets some
            return real(self, piece, weight)
        work.Worker._result = result
        if what == "hang":
            hqqtensor.cli.stream.quantize_files = lambda *args: run.quantize_files(*args, patience=1.5)
        sys.stderr = open(parent / f"{number}.err", "w")
        sys.stdout = open(parent / f"{number}.out", "w")
        code = hqqtensor.cli.main(
            ["quantize", dense, str(parent / "out"), "--max-shard-size", "20KB", "--workers-join"]
        )
        print(len(taken), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)

    pids = []
    for number in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            worker(number)
    if what == "hang":
        codes = [os.waitpid(pid, 0)[1] for pid in pids[1:]]
        os.kill(pids[0], 9)
        codes.insert(0, os.waitpid(pids[0], 0)[1])
    else:
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
    print(*codes)
"""


def run_workers(dense: Path, parent: Path, count: int, what: str) -> tuple[list[int], list[str], list[str]]:
    """Exit statuses, and what the workers wrote on stderr and stdout."""
    parent.mkdir()
    run = run_script(WORKERS, dense, parent, count, what)
    assert run.returncode == 0, run.stderr[-2000:]
    texts = [[(parent / f"{n}.{kind}").read_text() for n in range(count)] for kind in ("err", "out")]
    return [int(code) for code in run.stdout.split()], *texts


@pytest.fixture(scope="module")
def want(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("want") / "out"
    assert quantize(dense, out, "--max-shard-size", "20KB", "--json") == 0
    return files(out)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_same_bytes_as_one(count: int, dense: Path, tmp_path: Path, want) -> None:
    codes, errors, outputs = run_workers(dense, tmp_path / "place", count, "work")
    assert codes == [0] * count, errors
    assert files(tmp_path / "place" / "out") == want
    taken = [int(error.split()[-1]) for error in errors]
    assert all(taken) and sum(taken) == 20, taken
    assert sorted(bool(text) for text in outputs) == [False] * (count - 1) + [True]
    assert not folder_of(tmp_path / "place" / "out").exists()


def test_the_work_of_a_process_that_dies_is_taken_over(dense: Path, tmp_path: Path, want) -> None:
    codes, errors, _ = run_workers(dense, tmp_path / "place", 2, "die")
    assert codes == [signal.SIGKILL, 0], errors
    assert files(tmp_path / "place" / "out") == want


def test_a_process_that_hangs_ends_the_others_with_a_message(dense: Path, tmp_path: Path, want) -> None:
    place = tmp_path / "place"
    codes, errors, _ = run_workers(dense, place, 2, "hang")
    assert codes[1] == 1 << 8 and "without finishing; end it, and give the command again" in errors[1]
    assert not (place / "out").exists()
    assert quantize(dense, place / "out", "--max-shard-size", "20KB", "--json", "--workers-join") == 0
    assert files(place / "out") == want


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
