"""save_model: a model, quantized or not, to safetensors, whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hqqtensor.presets import parse_size
from hqqtensor.serialization.files import DEFAULT_NAME, checkpoint_files, index_path
from hqqtensor.serialization.layout import CheckpointError, flatten, torchao_entry
from hqqtensor.tensor import HQQTensor

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

GUARD = torch.tensor(list(b"Quantized by hqqtensor: pip install hqqtensor, import hqqtensor"), dtype=torch.uint8)
"""Stored under the first quantized weight's own name, so that a loader which does not know hqqtensor finds a weight
of the wrong shape and fails, where it would otherwise fill the weights that it misses with random numbers."""


def save_model(
    model: nn.Module,
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    non_persistent_buffers: bool = True,
) -> None:
    """Write the model's state to ``path``, a ``.safetensors`` file or a directory (``model.safetensors`` in it).

    A tied weight is stored once. Over ``max_shard_size`` bytes the state goes to shards with an index file. Files
    are written under temporary names and renamed at the end, the index last. Non-persistent buffers are stored
    too, for ``load_model`` into a model on the meta device, unless ``non_persistent_buffers`` is False: for models of
    transformers ``load_model`` can compute them. ValueError if a tensor is on the meta device.
    """
    units, header = collect(model, non_persistent_buffers)
    _write_units(units, {**(metadata or {}), **header}, path, max_shard_size)


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike, aliases: Mapping[str, str], hidden: Sequence[str],
    max_shard_size: int | str = "5GB", torchao: bool = False,
) -> None:  # fmt: skip
    """``save_model`` for a state by name; ``aliases``: names that are stored under another; ``hidden``: names of
    non-persistent buffers in ``state``; ``torchao``: entries as torchao's safetensors code reads them, no guard."""
    units, header = split_state(state, dict(aliases), list(hidden), torchao)
    _write_units(units, header, path, max_shard_size)


def _write_units(
    units: list[dict[str, Tensor]], header: dict[str, str], path: str | os.PathLike, max_shard_size: int | str
) -> None:
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / DEFAULT_NAME
    limit = int(parse_size(max_shard_size, "max_shard_size", _UNITS))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for tensors in units:
        nbytes = sum(t.nbytes for t in tensors.values())
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1].update(tensors)
        size += nbytes
    _write(path, shards, header)


def collect(model: nn.Module, non_persistent: bool = True) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """The tensors of the model's state, those that belong in one file together, and the files' metadata."""
    state = dict(model.state_dict(keep_vars=True))
    extra = [n for n, buffer in model.named_buffers() if non_persistent and n not in state and buffer is not None]
    state |= {name: buffer for name, buffer in model.named_buffers() if name in extra}
    return split_state(state, {}, extra)


def split_state(
    state: Mapping[str, Tensor], aliases: dict[str, str], extra: list[str], torchao: bool = False
) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """``collect`` for a state by name; ``extra``: names of non-persistent buffers in it."""
    units: list[dict[str, Tensor]] = []
    entries: dict[str, str] = {}
    seen: dict[object, str] = {}
    guarded = False
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: state of type {type(tensor).__name__} cannot be saved to safetensors")
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: is on the meta device and holds no numbers")
        first = seen.setdefault(_identity(tensor), name)
        if first != name:
            aliases[name] = first
        elif isinstance(tensor, HQQTensor):
            parts, entry = flatten(name, tensor)
            if torchao:
                entry = torchao_entry(tensor)
            elif not guarded and name.rpartition(".")[2][0].islower():
                parts[name], guarded = GUARD, True
            units.append({k: v.detach().contiguous().cpu() for k, v in parts.items()})
            entries[name] = entry
        else:
            units.append({name: _own(tensor.detach())})
            entries[name] = json.dumps({"_type": "Tensor"})
    header = {
        "format": "pt",
        **entries,
        "tensor_names": json.dumps(list(entries)),
        "hqqtensor": json.dumps({"version": 1, "aliases": aliases, "non_persistent_buffers": extra}),
    }
    return units, header


def _identity(tensor: Tensor) -> object:
    plain = tensor.qdata if isinstance(tensor, HQQTensor) else tensor
    if plain.numel() == 0:
        return id(tensor)
    return type(tensor) is HQQTensor, plain.device, plain.data_ptr(), plain.shape, plain.stride(), plain.dtype


def _own(tensor: Tensor) -> Tensor:
    """safetensors refuses tensors that share memory; part of a larger storage is copied out."""
    tensor = tensor.contiguous().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write(path: Path, shards: list[dict[str, Tensor]], header: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(shards)
    names = [path.name] if count == 1 else [f"{path.stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    try:
        stale = {p.name for p in checkpoint_files(path)} - set(names)
    except CheckpointError:
        stale = set()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        for name, tensors in zip(names, shards, strict=True):
            save_file(tensors, os.path.join(scratch, name), metadata=header)
        index = {
            "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
            "weight_map": {key: name for name, s in zip(names, shards, strict=True) for key in s},
        }
        for name in names:
            os.replace(os.path.join(scratch, name), path.parent / name)
        if count > 1:
            written = Path(scratch, "index.json")
            written.write_text(json.dumps(index, indent=1))
            os.replace(written, index_path(path))
            path.unlink(missing_ok=True)
        else:
            index_path(path).unlink(missing_ok=True)
    for name in stale:
        (path.parent / name).unlink(missing_ok=True)
