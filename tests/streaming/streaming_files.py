"""Running ``hqqtensor quantize``, and comparing what two runs wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hqqtensor.cli import main


def quantize(*args: object) -> int:
    return main(["quantize", *map(str, args)])


def contents(directory: Path) -> dict[str, Any]:
    """All tensors of a directory by name and file, and each file's metadata without the identity of the save."""
    result: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata())
            shared = json.loads(metadata.pop("hqqtensor"))
            shared.pop("save")
            result[file.name] = metadata, shared
            for key in opened.keys():  # noqa: SIM118
                result[f"{file.name}: {key}"] = opened.get_tensor(key)
    return result


def assert_equal(got: Path, want: Path) -> None:
    """The same tensors in the same files, bit for bit, with the same metadata, and the same other files."""
    a, b = contents(got), contents(want)
    assert list(sorted(a)) == sorted(b)
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype and value.shape == b[name].shape, name
            assert torch.equal(value.view(torch.uint8), b[name].view(torch.uint8)), name
        else:
            assert value == b[name], name
    assert files(got).keys() == files(want).keys()
    others = {name: data for name, data in files(got).items() if not name.endswith(".safetensors")}
    assert others == {name: data for name, data in files(want).items() if name in others}


def files(directory: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
