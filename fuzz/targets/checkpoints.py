"""Our checkpoints: one file, torchao's entries, shards with an index; checked with docs/examples/read_numpy.py."""

import importlib.util
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fuzz.mutate import damage_bytes, json_text
from fuzz.safetensors_bytes import damage
from fuzz.target import ROOT, Files, Target, Wrong, check_usable
from hqqtensor import HQQTensor, backend, load_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.serialization.load import read_checkpoint

ASSETS = ROOT / "tests" / "assets" / "checkpoints"
INDEX = "model.safetensors.index.json"


@cache
def vectors() -> list[Files]:
    folders = sorted(path.parent for path in ASSETS.glob("v*/*/expected.safetensors"))
    read = ({f.name: f.read_bytes() for f in folder.glob("model*")} for folder in folders)
    return [files for files in read if files]


@cache
def numpy_reader() -> Any:
    spec = importlib.util.spec_from_file_location("read_numpy", ROOT / "docs" / "examples" / "read_numpy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _single(rng: random.Random) -> Files:
    files = rng.choice([files for files in vectors() if INDEX not in files])
    (name,) = files
    return {name: damage(rng, files[name])}


def _sharded(rng: random.Random) -> Files:
    files = dict(rng.choice([files for files in vectors() if INDEX in files]))
    shards = [name for name in files if name != INDEX]
    choice = rng.random()
    if choice < 0.5:
        files[INDEX] = json_text(rng, json.loads(files[INDEX])).encode("utf-8", "replace")
    elif choice < 0.6:
        files[INDEX] = damage_bytes(rng, files[INDEX])
    elif choice < 0.7:
        files[shards[0]], files[shards[-1]] = files[shards[-1]], files[shards[0]]
    elif choice < 0.75:
        del files[rng.choice(shards)]
    else:
        name = rng.choice(shards)
        files[name] = damage(rng, files[name])
    return files


def _dense_model() -> nn.Module:
    """A dense model that most of the undamaged files fit."""
    model = nn.Module()
    for name, columns, rows in (("0", 128, 12), ("1", 12, 3)):
        part = nn.Linear(1, 1)  # to draw the numbers of a larger one would take longer than to load them
        part.in_features, part.out_features = columns, rows
        part.weight, part.bias = (nn.Parameter(torch.full(shape, 0.5)) for shape in ((rows, columns), (rows,)))
        model.add_module(name, part)
    return model


def _check_load_model(folder: Path) -> None:
    """On an error the model is as it was; on success it holds what the file does."""
    model = _dense_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        load_model(model, folder, strict=False)
    except CheckpointError:
        after = dict(model.named_parameters())
        if any(isinstance(after[n], HQQTensor) or not torch.equal(after[n], t) for n, t in before.items()):
            raise Wrong("load_model raised, and the model is no longer what it was") from None


def run(files: Files, folder: Path) -> None:
    _check_load_model(folder)
    state, _, _ = read_checkpoint(folder)
    inspect_checkpoint(folder)
    for name, tensor in state.items():
        check_usable(name, tensor)
    _compare_with_numpy({n: t for n, t in state.items() if isinstance(t, HQQTensor) and t.numel()}, folder)


def _compare_with_numpy(weights: dict[str, HQQTensor], folder: Path) -> None:
    if not weights:
        return
    reader = numpy_reader()
    arrays: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            some, of_file = reader.read_safetensors(file)
        except KeyError:  # a dtype that numpy lacks
            return
        arrays, metadata = arrays | some, metadata | of_file
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        prefix = f"{module}{'.' if module else ''}_{leaf}_"
        with np.errstate(all="ignore"), backend("dequantize"):
            theirs = reader.dequantize(prefix, json.loads(metadata[name]), arrays)
            ours = tensor.dequantize().detach()
        want = torch.from_numpy(np.ascontiguousarray(theirs)).to(ours.dtype)
        if ours.shape != want.shape or not torch.equal(ours.float().nan_to_num(), want.float().nan_to_num()):
            raise Wrong(f"{name}: the reader of docs/examples reads other numbers from {tensor!r}")


TARGETS = (
    Target("checkpoint", _single, run, (CheckpointError,)),
    Target("index", _sharded, run, (CheckpointError,)),
)
