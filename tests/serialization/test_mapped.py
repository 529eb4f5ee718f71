"""What becomes of a model whose files are changed or cut short while it is in use, mapped or read."""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_fresh
from safetensors.torch import save_file
from torch import nn

from hqqtensor import HqqConfig, load_model, quantize_, save_model
from hqqtensor.cli.arguments import make_parser
from hqqtensor.serialization import files
from hqqtensor.serialization.files import read_tensors
from hqqtensor.serialization.inspect import inspect_checkpoint
from hqqtensor.serialization.mapped import DTYPES


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


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_read_is_one_file_also_where_another_takes_its_name(
    file: Path, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_tensors(file, mmap=False)[0]
    other = file.with_name("other.safetensors")
    save_file({"x": torch.zeros(3)}, other)
    opened = files.safe_open

    def open_then_replace(*args: Any, **options: Any) -> Any:
        result = opened(*args, **options)
        os.replace(other, file)
        return result

    monkeypatch.setattr(files, "safe_open", open_then_replace)
    read = read_tensors(file, mmap=mmap)[0]
    assert all(torch.equal(read[name], before[name]) for name in before) and read.keys() == before.keys()


def test_tensors_of_every_dtype_and_shape_are_read_as_they_were_written(tmp_path: Path) -> None:
    numbers = torch.randint(256, (7 * 16,), dtype=torch.uint8)
    written = {name: (numbers % 2 if name == "BOOL" else numbers).view(dtype) for name, dtype in DTYPES.items()}
    written |= {"odd": numbers[:7], "odd.after": numbers[:6].view(torch.bfloat16), "none": numbers[:0].reshape(0, 4)}
    written |= {"one": torch.tensor(2.5), "square": torch.randn(3, 5)}
    save_file({name: tensor.clone() for name, tensor in written.items()}, tmp_path / "all.safetensors")
    read = read_tensors(tmp_path / "all.safetensors")[0]
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_reading_again_and_again_leaves_nothing_behind(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.zeros(1000) for i in range(50)}, tmp_path / "many.safetensors")

    def read(times: int) -> int:
        for _ in range(times):
            read_tensors(tmp_path / "many.safetensors")
        gc.collect()
        return sys.getallocatedblocks()

    before = read(5)
    assert read(20) - before < 20 * 50, "less than a Python object for each tensor that was read"


def test_a_dtype_that_is_unknown_is_named(tmp_path: Path) -> None:
    file = tmp_path / "f4.safetensors"
    header = b'{"w":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    for reads in (read_tensors, inspect_checkpoint):
        with pytest.raises(ValueError, match=r"f4\.safetensors: tensors of dtype 'F4' cannot be read"):
            reads(file)


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
