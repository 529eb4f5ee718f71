"""What becomes of a model whose files are changed or cut short while it is in use, mapped or read."""

import signal
from pathlib import Path

import pytest
import torch
from fresh_python import run_fresh
from torch import nn

from hqqtensor import HqqConfig, load_model, quantize_, save_model
from hqqtensor.cli.arguments import make_parser
from hqqtensor.serialization.files import read_tensors


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 256))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = linear()
    quantize_(model, HqqConfig(4, 64))
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


CUT = """
    import os, sys, torch
    from torch import nn
    from hqqtensor import load_model

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 256))
    load_model(model, sys.argv[1], mmap=sys.argv[2] == "mapped")
    os.truncate(sys.argv[1], 1000)
    print(model[0].weight.qdata.sum().item())
"""


def test_a_file_that_is_cut_short_ends_the_process_if_it_is_mapped_and_not_if_it_was_read(file: Path) -> None:
    whole = file.read_bytes()
    total = read_tensors(file, mmap=False)[0]["0._weight_qdata"].sum().item()
    assert run_fresh(CUT, file, "mapped").returncode == -signal.SIGBUS
    file.write_bytes(whole)
    run = run_fresh(CUT, file, "read")
    assert (run.returncode, run.stdout) == (0, f"{total}\n"), run.stderr


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_written_to_changes_a_mapped_model_alone(file: Path, mmap: bool) -> None:
    with torch.device("meta"):
        model = linear()
    load_model(model, file, mmap=mmap)
    before = read_tensors(file, mmap=False)[0]["0._weight_qdata"]
    with open(file, "r+b") as out:
        out.seek(-1000, 2)
        out.write(bytes(1000))
    now = read_tensors(file, mmap=False)[0]["0._weight_qdata"]
    assert not torch.equal(now, before), "the bytes that were written are no codes"
    assert torch.equal(model[0].weight.qdata, now if mmap else before)


def test_what_is_read_is_what_is_mapped(file: Path) -> None:
    mapped, metadata = read_tensors(file)
    read, again = read_tensors(file, mmap=False)
    assert metadata == again and mapped.keys() == read.keys()
    assert all(torch.equal(mapped[name], read[name]) for name in read)


def test_reading_names_the_file_in_its_errors(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        read_tensors(file, mmap=False)
    with pytest.raises(ValueError, match=r"gone\.safetensors: cannot be read"):
        read_tensors(file.with_name("gone.safetensors"), mmap=False)


@pytest.mark.parametrize(
    "command", ["generate DIR -p x", "chat DIR", "serve DIR", "bench DIR", "eval DIR --text T", "convert DIR OUT"]
)
def test_commands_that_open_quantized_models_can_read_them(command: str) -> None:
    parser = make_parser()
    assert parser.parse_args(command.split()).mmap and not parser.parse_args([*command.split(), "--no-mmap"]).mmap
