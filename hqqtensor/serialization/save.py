"""save_model: a model, quantized or not, to safetensors, whole or not at all."""

import bisect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hqqtensor.presets import parse_size
from hqqtensor.serialization.files import DEFAULT_NAME, write_tensors
from hqqtensor.serialization.header import file_metadata
from hqqtensor.serialization.layout import flatten, torchao_entry
from hqqtensor.serialization.publish import publish
from hqqtensor.serialization.scratch import scratch_beside
from hqqtensor.tensor import HQQTensor
from hqqtensor.transfer import check_compression, pack_directory
from hqqtensor.whole_file import naming, sync_to_disk

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
    compression: str | None = None,
) -> None:
    """Write the model's state to ``path``, a ``.safetensors`` file or a directory (``model.safetensors`` in it).

    A tied weight is stored once. Over ``max_shard_size`` bytes the state goes to shards with an index file. A save
    that is cut short, also by a loss of power, leaves the checkpoint that was there. Non-persistent buffers are stored
    too, for ``load_model`` into a model on the meta device, unless ``non_persistent_buffers`` is False: for models of
    transformers ``load_model`` can compute them. ValueError if a tensor is on the meta device or could not be loaded
    again (NaN in its scales); OSError naming the file where it cannot be written (a full disk).
    ``compression``: "zstd", "deflate" or "none" writes one packed file for the network instead, of which
    ``hqqtensor unpack`` makes a directory for ``load_model``; the disk must hold both for a moment. ImportError where
    zstandard is missing.
    """
    if compression is not None:
        check_compression(compression)
        if Path(path).suffix == ".safetensors" or Path(path).is_dir():
            raise ValueError(f"{os.fspath(path)}: a compressed save is one file of another kind, such as model.hqqpack")
    units, header = collect(model, non_persistent_buffers)
    header = {**(metadata or {}), **header}
    if compression is None:
        _write_units(units, header, path, max_shard_size)
    else:
        _write_packed(units, header, Path(path), max_shard_size, compression)


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike, aliases: Mapping[str, str], hidden: Sequence[str],
    max_shard_size: int | str = "5GB", torchao: bool = False,
) -> None:  # fmt: skip
    """``save_model`` for a state by name; ``aliases``: names that are stored under another; ``hidden``: names of
    non-persistent buffers in ``state``; ``torchao``: entries as torchao's safetensors code reads them, no guard."""
    units, header = split_state(state, dict(aliases), list(hidden), torchao)
    _write_units(units, header, path, max_shard_size)


def _write_units(
    units: list[dict[str, Tensor]], header: dict[str, str], path: str | os.PathLike, max_shard_size: int | str,
    sync: Callable[[Path], None] = sync_to_disk,
) -> None:  # fmt: skip
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / DEFAULT_NAME
    limit = shard_limit(max_shard_size)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in units]
    shards = [{key: t for unit in units[part] for key, t in unit.items()} for part in into_shards(sizes, limit)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), scratch_beside(path) as scratch:
        written = [scratch / f"{place}.safetensors" for place in range(len(shards))]
        for file, tensors in zip(written, shards, strict=True):
            write_tensors(tensors, file, header, shown=path)
        nbytes = sum(t.nbytes for tensors in shards for t in tensors.values())
        publish(path, written, [list(tensors) for tensors in shards], nbytes, sync)


def _write_packed(
    units: list[dict[str, Tensor]], header: dict[str, str], path: Path, max_shard_size: int | str, compression: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), scratch_beside(path) as scratch:
        plain, packed = scratch / "plain", scratch / path.name
        _write_units(units, header, plain, max_shard_size, sync=lambda path: None)
        with open(packed, "xb") as stream:
            pack_directory(plain, stream, compression)
        sync_to_disk(packed)
        os.replace(packed, path)
        sync_to_disk(path.parent)


def shard_limit(max_shard_size: int | str) -> int:
    """Bytes of ``max_shard_size``; ValueError where it is no size."""
    return int(parse_size(max_shard_size, "max_shard_size", _UNITS))


def into_shards(sizes: Sequence[int], limit: int) -> list[slice]:
    """Which of the tensors of these bytes, in their order, go into each file: up to ``limit`` bytes, or one tensor."""
    firsts, size = [0], 0
    for place, nbytes in enumerate(sizes):
        if place > firsts[-1] and size + nbytes > limit:
            firsts.append(place)
            size = 0
        size += nbytes
    return [slice(first, last) for first, last in zip(firsts, [*firsts[1:], len(sizes)], strict=True)]


def takes_guard(name: str) -> bool:
    """Whether ``GUARD`` may stand for the quantized weight of this name."""
    return name.rpartition(".")[2][0].islower()


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
    memory: dict[int, list[tuple[int, int]]] = {}
    guarded = False
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: state of type {type(tensor).__name__} cannot be saved to safetensors")
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: is on the meta device and holds no numbers")
        first = seen.setdefault(_identity(tensor), name)
        if first != name:
            aliases[name] = first
            continue
        parts, entries[name] = {name: tensor}, json.dumps({"_type": "Tensor"})
        if isinstance(tensor, HQQTensor):
            parts, entries[name] = flatten(name, tensor)
            if torchao:
                entries[name] = torchao_entry(tensor)
            elif not guarded and takes_guard(name):
                parts[name], guarded = GUARD, True
        units.append({key: _separate(part, memory) for key, part in parts.items()})
    return units, file_metadata(entries, aliases, extra)


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that are one and the same: all of their data and settings."""
    if isinstance(tensor, HQQTensor):
        names, attributes = tensor.__tensor_flatten__()
        return tuple(_identity(getattr(tensor, name)) for name in names), tuple(attributes.values())
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _separate(tensor: Tensor, memory: dict[int, list[tuple[int, int]]]) -> Tensor:
    """``tensor`` contiguous on the CPU, copied where an earlier one has some of its memory: safetensors refuses that.

    ``memory``: of each storage the ranges that are taken, in order.
    """
    tensor = tensor.detach().contiguous().cpu()
    ranges = memory.setdefault(tensor.untyped_storage().data_ptr(), [])
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    place = bisect.bisect(ranges, (first, last))
    overlaps = (place > 0 and ranges[place - 1][1] > first) or (place < len(ranges) and ranges[place][0] < last)
    if overlaps and tensor.numel():
        return tensor.clone()
    ranges.insert(place, (first, last))
    return tensor
