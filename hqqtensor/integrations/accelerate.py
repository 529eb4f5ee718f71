"""accelerate: quantized weights offloaded to the disk. (Those offloaded to the cpu need no change of accelerate.)

accelerate writes a weight as one array of numbers. A quantized one becomes a small safetensors file in its place, which
is read memory-mapped and checked like any other.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import ACCELERATE
from hqqtensor.serialization.files import read_tensors, write_tensors
from hqqtensor.serialization.layout import build, flatten, parse_entry
from hqqtensor.tensor import HQQTensor

INDEX_KEY = "hqqtensor"
"""Where accelerate's index of offloaded weights says how a quantized one is stored."""


def write_offloaded(weight: HQQTensor, name: str, folder: str | os.PathLike | None) -> dict[str, Any]:
    """Write the weight to ``folder``; returns its entry for accelerate's index. ValueError without a folder."""
    if folder is None:
        raise ValueError(f"{name} goes to the disk, which needs a folder to write it to: give offload_folder")
    tensors, entry = flatten(name, weight.detach())
    file = Path(folder, f"{name}.dat").absolute()
    write_tensors({key: t.cpu().contiguous() for key, t in tensors.items()}, file, None, shown=file)
    stored = {"file": str(file), "name": name, "entry": entry}
    return {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape), INDEX_KEY: stored}


def read_offloaded(stored: dict[str, str]) -> HQQTensor:
    """The weight that ``write_offloaded`` wrote, memory-mapped; CheckpointError where the file is damaged."""
    tensors, _ = read_tensors(Path(stored["file"]))
    return build(stored["name"], parse_entry(stored["name"], stored["entry"]), tensors)


def install() -> None:
    """Let accelerate's writer and reader of offloaded weights call ours for quantized ones."""
    module, reason = "accelerate.utils.offload", "offloading quantized weights to the disk"
    patches.wrap(module, "offload_weight", _writer, reason, ACCELERATE)
    patches.wrap(module, "load_offloaded_weight", _reader, reason, ACCELERATE)


def _writer(write: Callable) -> Callable:
    def offload_weight(weight: Tensor, weight_name: str, offload_folder: Any, index: Any = None) -> Any:
        if not isinstance(weight, HQQTensor):
            return write(weight, weight_name, offload_folder, index)
        patches.require("accelerate.utils.offload.")
        entry = write_offloaded(weight, weight_name, offload_folder)
        if index is not None:
            index[weight_name] = entry
        return index

    return offload_weight


def _reader(read: Callable) -> Callable:
    def load_offloaded_weight(weight_file: Any, weight_info: Any) -> Tensor:
        stored = weight_info.get(INDEX_KEY)
        return read(weight_file, weight_info) if stored is None else read_offloaded(stored)

    return load_offloaded_weight
