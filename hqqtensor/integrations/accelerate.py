"""accelerate: quantized weights offloaded to the disk. (Those offloaded to the cpu need nothing of their own.)

accelerate writes a weight as one array of numbers; a quantized one becomes a small safetensors file in its place, read
back memory-mapped and checked like any other. ``import hqqtensor`` registers this as soon as accelerate is imported.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from hqqtensor.import_hook import when_imported
from hqqtensor.serialization.files import read_tensors, write_tensors
from hqqtensor.serialization.layout import build, flatten, parse_entry
from hqqtensor.tensor import HQQTensor

_KEY = "hqqtensor"


def write_offloaded(weight: HQQTensor, name: str, folder: str | os.PathLike | None) -> dict[str, Any]:
    """Write the weight to ``folder``; what accelerate's index of offloaded weights is to say of it."""
    if folder is None:
        raise ValueError(f"{name} goes to the disk, which needs a folder to write it to: give offload_folder")
    tensors, entry = flatten(name, weight.detach())
    file = Path(folder, f"{name}.dat").absolute()
    write_tensors({key: t.cpu().contiguous() for key, t in tensors.items()}, file, None, shown=file)
    own = {"file": str(file), "name": name, "entry": entry}
    return {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape), _KEY: own}


def read_offloaded(own: dict[str, str]) -> HQQTensor:
    """The weight that ``write_offloaded`` wrote, memory-mapped; CheckpointError where the file is damaged."""
    tensors, _ = read_tensors(Path(own["file"]))
    return build(own["name"], parse_entry(own["name"], own["entry"]), tensors)


def register_when_imported() -> None:
    """Register as soon as the user imports accelerate; costs nothing where it is never imported."""
    when_imported("accelerate.utils.offload", _install)


def _install() -> None:
    """Wrap accelerate's writer and reader in their module and wherever they were imported from there; once."""
    from accelerate.utils import offload

    write, read = offload.offload_weight, offload.load_offloaded_weight
    if hasattr(write, "__wrapped__"):
        return

    @functools.wraps(write)
    def offload_weight(weight: Tensor, weight_name: str, offload_folder: Any, index: Any = None) -> Any:
        if not isinstance(weight, HQQTensor):
            return write(weight, weight_name, offload_folder, index)
        entry = write_offloaded(weight, weight_name, offload_folder)
        if index is not None:
            index[weight_name] = entry
        return index

    @functools.wraps(read)
    def load_offloaded_weight(weight_file: Any, weight_info: Any) -> Tensor:
        own = weight_info.get(_KEY)
        return read(weight_file, weight_info) if own is None else read_offloaded(own)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "accelerate":
            for old, new in ((write, offload_weight), (read, load_offloaded_weight)):
                if getattr(module, new.__name__, None) is old:
                    setattr(module, new.__name__, new)
