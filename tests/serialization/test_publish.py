"""Saving over a checkpoint: whatever stops it, one of the two is whole; two models never mix unnoticed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from fresh_python import run_fresh
from torch import nn

from hqqtensor import HqqConfig, load_model, quantize_, save_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.files import checkpoint_files
from hqqtensor.serialization.layout import CheckpointError

SHARDED, OTHERS, WHOLE = "12KB", "20KB", "5GB"


def layers() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(4)])


def model(value: float) -> nn.Sequential:
    m = layers()
    for p in m.parameters():
        p.data.uniform_(value, value + 1)
    quantize_(m, HqqConfig(4, 64, solver="rtn"))
    return m


def saved_values(path: Path) -> list[int]:
    """Of each layer of the checkpoint which model it is from: 0 or 10."""
    m = layers()
    load_model(m, path)
    return [int(layer.weight.dequantize().mean()) // 10 * 10 for layer in m]


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


@pytest.mark.parametrize("size", [WHOLE, SHARDED])
def test_files_are_on_disk_before_they_are_named_and_their_names_before_the_old_ones_go(
    tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model(0), tmp_path, max_shard_size=OTHERS)
    old = {file.name for file in checkpoint_files(tmp_path)}
    on_disk: set[str] = set()
    settled = False  # no name has changed since the folder was written to disk
    sync, replace, unlink = os.fsync, os.replace, Path.unlink

    def fsync(handle: int) -> None:
        nonlocal settled
        sync(handle)
        on_disk.add(os.readlink(f"/proc/self/fd/{handle}"))
        settled |= os.path.samefile(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)

    def rename(source: Path, target: Path) -> None:
        nonlocal settled
        assert os.path.realpath(source) in on_disk
        assert settled or not target.name.endswith(".json"), "the index is named before its shards are there"
        replace(source, target)
        settled = False

    def remove(path: Path, missing_ok: bool = False) -> None:
        assert settled or path.name not in old
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(Path, "unlink", remove)
    save_model(model(10), tmp_path, max_shard_size=size)
    assert settled and saved_values(tmp_path) == [10] * 4 and not old & set(names(tmp_path))


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, after: bool) -> list[str]:
    """Let the ``step``-th replacement or removal of a file raise, before or ``after`` it is done; what was called."""
    calls: list[str] = []

    def stopping(real, name):
        def call(*args, **kwargs):
            calls.append(name)
            stops = len(calls) == step
            if stops and not after:
                raise Stopped
            real(*args, **kwargs)
            if stops:
                raise Stopped

        return call

    monkeypatch.setattr(os, "replace", stopping(os.replace, "replace"))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink, "unlink"))
    return calls


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("old", "new"), [(SHARDED, SHARDED), (SHARDED, OTHERS), (SHARDED, WHOLE), (WHOLE, SHARDED)])
def test_an_interrupt_at_any_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, old, new, after) -> None:
    first, second = model(0), model(10)
    save_model(first, tmp_path / "clean", max_shard_size=old)
    for step in range(1, 30):
        path = tmp_path / str(step)
        shutil.copytree(tmp_path / "clean", path)
        with monkeypatch.context() as patch:
            calls = stop_at(patch, step, after)
            try:
                save_model(second, path, max_shard_size=new)
            except Stopped:
                done = False
            else:
                done = True
        assert saved_values(path) in ([0] * 4, [10] * 4), (step, calls)
        if done:
            break
        save_model(second, path, max_shard_size=new)  # what was left does not disturb the next save
        assert saved_values(path) == [10] * 4
    assert done and step > 3
    assert saved_values(path) == [10] * 4


def test_an_interrupted_first_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    for step in (1, 3, 5):
        with monkeypatch.context() as patch:
            stop_at(patch, step, after=False)
            with pytest.raises(Stopped):
                save_model(model(0), tmp_path, max_shard_size=SHARDED)
        assert names(tmp_path) == []


def test_shards_have_the_usual_names_where_those_are_free(tmp_path) -> None:
    usual = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)] + ["model.safetensors.index.json"]
    save_model(model(0), tmp_path, max_shard_size=SHARDED)
    assert names(tmp_path) == usual
    save_model(model(10), tmp_path, max_shard_size=SHARDED)  # over those in use: names of their own
    assert len(names(tmp_path)) == 5 and not set(names(tmp_path)) & set(usual[:4])
    assert all("-of-00004" in file.name for file in checkpoint_files(tmp_path)) and saved_values(tmp_path) == [10] * 4
    save_model(model(0), tmp_path, max_shard_size=SHARDED)
    assert names(tmp_path) == usual and saved_values(tmp_path) == [0] * 4
    save_model(model(10), tmp_path)
    assert names(tmp_path) == ["model.safetensors"]


def test_shards_of_two_saves_are_not_read(tmp_path) -> None:
    for value in (0, 10):
        save_model(model(value), tmp_path / str(value), max_shard_size=SHARDED)
    shutil.copy(tmp_path / "10" / "model-00002-of-00004.safetensors", tmp_path / "0")
    m = layers()
    before = [p.clone() for p in m.parameters()]
    for read in (lambda: load_model(m, tmp_path / "0"), lambda: inspect_checkpoint(tmp_path / "0")):
        with pytest.raises(CheckpointError, match=r"model-0000\d-of-00004.* and model-0000\d.*two different saves"):
            read()
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters(), strict=True))


# Processes that are killed, and two that save at once, are forked off one process of its own.
COMMON = """
    import collections, os, random, shutil, signal, sys, tempfile, time
    from pathlib import Path
    import torch
    from torch import nn
    torch.set_num_threads(1)
    from hqqtensor import HqqConfig, load_model, quantize_, save_model

    def layers():
        return nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(4)])

    def model(value):
        m = layers()
        for p in m.parameters():
            p.data.uniform_(value, value + 1)
        quantize_(m, HqqConfig(4, 64, solver="rtn"))
        return m

    def values(path):
        m = layers()
        load_model(m, path)
        return {round(float(layer.weight.dequantize().mean())) // 10 for layer in m}

    def child(run):
        pid = os.fork()
        if pid == 0:
            try:
                run()
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
        return pid

    first, second = model(0), model(10)
    root = Path(tempfile.mkdtemp(dir=sys.argv[1]))
"""

KILLED = """
    from killing import kill_at

    def killed_at(step, run):
        kill_at(step, (os, "replace"), (os, "unlink"), (Path, "unlink"))
        run()

    for old, new in (("12KB", "12KB"), ("12KB", "5GB"), ("5GB", "12KB")):
        kills = 0
        for step in range(1, 40):
            path = root / f"{old}-{new}-{step}"
            save_model(first, path, max_shard_size=old)
            save = lambda: save_model(second, path, max_shard_size=new)
            status = os.waitpid(child(lambda: killed_at(step, save)), 0)[1]
            found = values(path)
            assert len(found) == 1, (old, new, step, found)
            if status == 0:
                assert found == {1}
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            save_model(second, path, max_shard_size=new)
            assert values(path) == {1}
        assert kills > 3 and status == 0, kills
    print("done")
"""

AT_ONCE = """
    def slowly(run):
        def wrap(real):
            def call(*args, **kwargs):
                time.sleep(random.random() / 200)
                return real(*args, **kwargs)
            return call
        os.replace, Path.unlink = wrap(os.replace), wrap(Path.unlink)
        random.seed(os.getpid())
        run()

    for sizes in (("12KB", "12KB"), ("12KB", "20KB"), ("12KB", "5GB")):
        winners = collections.Counter()
        for i in range(15):
            path = root / f"{sizes}-{i}"
            if i % 2:
                save_model(first, path, max_shard_size=sizes[0])
            pids = [
                child(lambda: slowly(lambda: save_model(m, path, max_shard_size=size)))
                for m, size in zip((first, second), sizes)
            ]
            statuses = [os.waitpid(pid, 0)[1] for pid in pids]
            assert statuses == [0, 0], statuses
            (winner,) = values(path)
            winners[winner] += 1
        assert sum(winners.values()) == 15
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("code", [KILLED, AT_ONCE], ids=["killed", "two at once"])
def test_processes_that_are_killed_or_save_at_once_leave_one_model(tmp_path, code: str) -> None:
    run = run_fresh(COMMON + code, tmp_path)
    assert run.returncode == 0 and run.stdout.splitlines()[-1:] == ["done"], run.stdout + run.stderr


def test_shards_that_transformers_writes_are_told_apart(tmp_path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    for name in ("a", "b"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"dense-{name}")
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"dense-{name}", quantization_config=HqqConfig(4, 64, solver="rtn")
        )
        quantized.save_pretrained(tmp_path / name, max_shard_size="30KB")
    shards = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for key, value in quantized.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    shutil.copy(tmp_path / "b" / min(shards.values()), tmp_path / "a")
    with pytest.raises(CheckpointError, match="two different saves"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
