"""Whatever stops a run, the same command goes on from there, and what it writes is bit-identical."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from fresh_python import run_fresh
from streaming_files import files, quantize

from hqqtensor.cli import model_dir
from hqqtensor.streaming import folder_of, plan, resources, work
from hqqtensor.streaming.source import Source

OPTIONS = ["--max-shard-size", "20KB"]

KILLED = """
    import os, random, sys, torch
    from pathlib import Path
    import hqqtensor.cli.quantize
    from hqqtensor import HqqConfig, selection
    from hqqtensor.cli import model_dir
    from hqqtensor.streaming import Source, make_plan, plan
    from killing import kill_at

    dense, parent = sys.argv[1], Path(sys.argv[2])
    plan.BATCH_BYTES = 1024
    torch.set_num_threads(1)
    out = parent / "out"
    command = ["quantize", dense, str(out), "--max-shard-size", "20KB", "--overwrite", "--json"]

    def run(step, *functions):
        # A child that is killed at the step-th call of any of the functions; its exit, 9 where it was killed.
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = open(parent.parent / "child.txt", "w")
            kill_at(step, *functions)
            os._exit(hqqtensor.cli.main(command))
        status = os.waitpid(pid, 0)[1]
        return os.WTERMSIG(status) or os.WEXITSTATUS(status)

    def data():
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    # On the meta device, which starts no threads that the children would lack: they then have imported what it takes.
    make_plan(model_dir.empty_model_of(Path(dense), torch.bfloat16), Source(Path(dense)), HqqConfig(4))
    assert run(0) == 0
    want = data()
    (out / "config.json").write_text("{}")  # what is there from now on is the old model
    old = data()
    points = {
        "read": [(os, "preadv")], "solve": [(selection.Choice, "quantize")], "write": [(os, "pwrite")],
        "sync": [(os, "fdatasync")], "index and rename": [(os, n) for n in ("rename", "fsync", "replace", "unlink")],
    }
    largest_step = {"read": 8, "solve": 5, "write": 25, "sync": 5, "index and rename": 24}
    random.seed(0)

    def check_finished(name):
        assert data() == want, name
        assert os.listdir(parent) == ["out"], (name, os.listdir(parent))
        (out / "config.json").write_text("{}")

    kills = 0
    for name, functions in points.items():
        kills_here = 0
        while kills_here < 4:
            code = run(random.randint(1, largest_step[name]), *functions)
            assert code in (0, 9), (name, code, (parent.parent / "child.txt").read_text())
            assert not out.exists() or data() in (old, want), name
            kills_here += code == 9
            if code == 0:
                check_finished(name)
        assert run(0) == 0, name
        check_finished(name)
        kills += kills_here
    print(kills)
"""


def test_a_run_that_is_killed_anywhere_goes_on_and_gives_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    """Kills spread over reading, solving, writing, syncing, and the last renames, while a model is replaced."""
    (tmp_path / "place").mkdir()
    run = run_fresh(KILLED, dense, tmp_path / "place")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "20\n"


def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BATCH_BYTES", 1024)


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def stop_at_quantizing(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Let the ``step``-th weight to quantize raise."""
    real, count = plan.Choice.quantize, iter(range(10_000))

    def call(self: plan.Choice, weight: torch.Tensor) -> object:
        if next(count) == step:
            raise error("stopped")
        return real(self, weight)

    monkeypatch.setattr(plan.Choice, "quantize", call)


def test_what_is_finished_is_not_done_again(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few_batches(monkeypatch)
    assert quantize(dense, tmp_path / "want", *OPTIONS, "--json") == 0
    with monkeypatch.context() as patch:
        stop_at_quantizing(patch, 9, KeyboardInterrupt)
        assert quantize(dense, tmp_path / "out", *OPTIONS) == 130
    assert "the same command goes on from there" in capsys.readouterr().err and not (tmp_path / "out").exists()
    names: list[str] = []
    real = work.Worker._result
    monkeypatch.setattr(work.Worker, "_result", lambda self, p, w: names.append(p.unit.name) or real(self, p, w))
    assert quantize(dense, tmp_path / "out", *OPTIONS) == 0
    err = capsys.readouterr().err
    assert "going on with what an interrupted run left" in err
    assert 0 < len(names) < 14 and "model.embed_tokens.weight" not in names
    assert files(tmp_path / "out") == files(tmp_path / "want")


def test_another_command_for_the_same_output_is_refused(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few_batches(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at_quantizing(patch, 9, KeyboardInterrupt)
        assert quantize(dense, tmp_path / "out") == 130
    before = files(tmp_path)
    for options, message in [
        (["--bits", 3], "nbits was 4 and is 3"),
        (["--max-shard-size", "1MB"], "max_shard_size was 5000000000 and is 1000000"),
        (["--calibrate", "random"], "holds an interrupted run of another call"),
    ]:
        assert quantize(dense, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err and files(tmp_path) == before


def test_a_changed_source_is_another_run(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few_batches(monkeypatch)
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    with monkeypatch.context() as patch:
        stop_at_quantizing(patch, 9, KeyboardInterrupt)
        assert quantize(source, tmp_path / "out") == 130
    shard = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-10_000:] = bytes(10_000)
    shard.write_bytes(data)
    assert quantize(source, tmp_path / "out") == 2 and "model differs" in capsys.readouterr().err


def test_a_shard_that_is_cut_short_while_it_is_read_is_named(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few_batches(monkeypatch)
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(dense, source)
    last = sorted(source.glob("*.safetensors"))[-1]
    whole, real = last.read_bytes(), Source.read

    def read(self: Source, tensor: object, *rows: object) -> torch.Tensor:
        if tensor.file == last:  # type: ignore[attr-defined]
            os.truncate(last, len(whole) // 2)
        return real(self, tensor, *rows)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", read)
        assert quantize(source, out) == 1
    message = capsys.readouterr().err
    assert f"{last}: ends within" in message and "it was cut short" in message and not out.exists()
    for harm, text in [(lambda: None, "not a whole safetensors file"), (last.unlink, f"shard {last.name} is missing")]:
        harm()
        assert quantize(source, out) == 1
        assert text in (err := capsys.readouterr().err) and err.count("\n") == 1
    last.write_bytes(whole)  # what was finished is still there
    assert quantize(source, out, "--json") == 0 and quantize(dense, tmp_path / "want", "--json") == 0
    got, want = files(out), files(tmp_path / "want")
    assert got["model.safetensors"] == want["model.safetensors"]


def test_a_weight_that_cannot_be_quantized_leaves_nothing(dense: Path, tmp_path: Path, capsys) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    model.save_pretrained(tmp_path / "source")
    assert quantize(tmp_path / "source", tmp_path / "out") == 1
    assert "layers.1.mlp.up_proj.weight: holds NaN or Inf" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


def test_a_full_disk_keeps_what_is_finished_and_the_old_model(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    few_batches(monkeypatch)
    out = tmp_path / "out"
    assert quantize(dense, out, "--bits", 2, "--json") == 0
    old = files(out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        assert quantize(dense, out, "--overwrite") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {out}: [Errno 27] File too large" in capsys.readouterr().err
    assert files(out) == old
    real, written = os.pwrite, 0

    def full(handle: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 30_000:
            raise OSError(28, "No space left on device")
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert quantize(dense, out, "--overwrite") == 1
    err = capsys.readouterr().err
    assert f"cannot write {out}: [Errno 28] No space left on device" in err and "the same command goes on" in err
    assert files(out) == old and folder_of(out).is_dir()
    assert quantize(dense, out, "--overwrite") == 0 and os.listdir(tmp_path) == ["out"]
    assert model_dir.open_quantized(out).model.layers[0].mlp.up_proj.weight.nbits == 4


@pytest.mark.parametrize("lacking", ["disk", "memory"])
def test_disk_and_memory_are_checked_before_the_work(lacking: str, dense: Path, tmp_path: Path, monkeypatch, capsys):
    if lacking == "disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(resources, "available_memory", lambda: 2**20)
    assert quantize(dense, tmp_path / "out") == 1
    text = {"disk": "of disk, and 0.00 GB are free in", "memory": "of memory, and 0.00 GB are available"}[lacking]
    assert text in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
