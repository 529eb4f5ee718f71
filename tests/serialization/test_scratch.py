"""What savers that were killed leave behind is removed by the next one; what others write is not."""

import os
import signal
from pathlib import Path

import pytest
import torch
from fresh_python import run_fresh
from safetensors.torch import save_file
from torch import nn

from hqqtensor import HqqConfig, quantize_, save_model
from hqqtensor.serialization.scratch import left_beside, locked, scratch_beside

KILLED = """
    import os, sys
    from torch import nn
    from hqqtensor import save_model
    from killing import kill_at

    kill_at(int(sys.argv[2]), (os, "replace"))
    save_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), sys.argv[1], max_shard_size="17KB")
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_a_killed_save_leaves_is_removed_by_the_next_one(tmp_path: Path, step: int) -> None:
    """Killed before the first of two shards is moved, before the second, and before the index."""
    assert run_fresh(KILLED, tmp_path, step).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == step
    save_model(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    assert names(tmp_path) == ["model.safetensors"]


def test_shards_that_others_wrote_stay(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, HqqConfig(4, 64))
    save_model(model, tmp_path)
    assert names(tmp_path) == ["model-00001-of-00002.safetensors", "model.safetensors"]


def test_the_folder_of_a_saver_that_is_alive_stays(tmp_path: Path) -> None:
    with scratch_beside(tmp_path / "out") as first:
        (first / "part").write_text("x")
        with scratch_beside(tmp_path / "out") as second:
            assert sorted(left_beside(tmp_path / "out")) == sorted([first, second]) and (first / "part").is_file()
            with locked(first) as is_ours:
                assert is_ours is False
    assert names(tmp_path) == []
