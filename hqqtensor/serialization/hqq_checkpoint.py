"""Checkpoints of the hqq library: which files are such, and all of their weights as HQQTensors.

Three layouts: flat safetensors (also what transformers wrote), ``qmodel.pt`` of {module: entries}, and the same with
the older {W_q, meta, bias}. Pickles are read with ``weights_only=True`` alone; dtypes come from a table.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.serialization.files import read_tensors, readable
from hqqtensor.serialization.hqq_layer import LAYER_KEYS, read_layer
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.tensor import HQQTensor

PICKLE_NAME = "qmodel.pt"
_QUANTIZED = ("zero_", "scale_", "meta_")
"""How the names of quantized scales and zeros begin: zero_q, meta_zero, zero_scale and so on."""


def pickle_file(path: str | os.PathLike) -> Path | None:
    """The ``.pt`` file of an hqq checkpoint given as file or directory; None where it is none."""
    path = Path(path)
    with readable(path):
        path = path / PICKLE_NAME if path.is_dir() else path
        return path if path.suffix == ".pt" and path.is_file() else None


def read_pickle(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """All parameters and buffers by name, mapped or read; CheckpointError for a file that is damaged, or holds code."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle raises anything: struct.error, IndexError, TypeError
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a file of tensors and plain values ({first})") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds no dict of modules")
    flat: dict[str, Any] = {}
    for module, entries in loaded.items():
        if not isinstance(module, str) or not isinstance(entries, Mapping):
            raise CheckpointError(f"{path}: {module!r} is no module with its entries")
        if not all(map(_holds_numbers, entries.values())):
            raise CheckpointError(f"{path}: {module!r} has a tensor that is sparse or holds no numbers")
        flat |= {f"{module}.{key}" if module else str(key): value for key, value in entries.items()}
    return from_flat(flat)


def _holds_numbers(value: Any) -> bool:
    """Whether all tensors in a value are plain ones in memory: a pickle may bring those of the meta device too."""
    if isinstance(value, Mapping):
        return all(map(_holds_numbers, value.values()))
    return not isinstance(value, Tensor) or (value.layout is torch.strided and value.device.type == "cpu")


def from_flat(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """Layers under ``NAME.W_q`` and what belongs to them become ``NAME.weight``; other tensors stay."""
    layers: dict[str, dict[str, Any]] = {key.rpartition(".")[0]: {} for key in flat if is_flat([key])}
    out: dict[str, Tensor] = {}
    for key, value in flat.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in layers and (leaf in LAYER_KEYS or not isinstance(value, Tensor) or leaf.startswith(_QUANTIZED)):
            layers[prefix][leaf] = value
        elif isinstance(value, Tensor):
            out[key] = value
        elif value is not None:
            raise CheckpointError(f"{key}: neither a tensor nor part of a quantized layer")
    for prefix, entries in layers.items():
        out[f"{prefix}.weight" if prefix else "weight"] = read_layer(prefix or "weight", entries)
    return out


def read_layers(files: Iterable[str | os.PathLike]) -> dict[str, HQQTensor]:
    """The quantized weights alone of flat safetensors files, {name: weight}."""
    flat: dict[str, Tensor] = {}
    for file in map(Path, files):
        flat |= read_tensors(file, lambda key: key.rpartition(".")[2] in LAYER_KEYS)[0]
    return {name: t for name, t in from_flat(flat).items() if isinstance(t, HQQTensor)}


def is_flat(keys: Iterable[str]) -> bool:
    """Whether tensor names are those of the hqq library's flat layout."""
    return any(key.rpartition(".")[2] == "W_q" for key in keys)
