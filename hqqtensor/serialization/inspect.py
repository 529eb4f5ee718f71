"""What a checkpoint holds, from the headers of its files alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from hqqtensor.serialization.files import checkpoint_files, open_file, readable_tensors
from hqqtensor.serialization.header import read_header
from hqqtensor.serialization.layout import data_key, keys_of, parse_entry
from hqqtensor.serialization.mapped import nbytes_of


@dataclass(frozen=True)
class TensorInfo:
    """One weight: kind "hqq" or "dense", logical shape, dtype, settings (None where dense), bytes in the file.

    code_bytes: those of ``nbytes`` that are codes; the others are scales, zero points and column scales. All of them
    where dense.
    """

    name: str
    kind: str
    shape: list[int]
    dtype: str
    nbits: int | None
    group_size: int | None
    axis: int | None
    format: str | None
    nbytes: int
    code_bytes: int


@dataclass(frozen=True)
class CheckpointInfo:
    """All weights of a checkpoint and their bytes together."""

    tensors: list[TensorInfo]
    nbytes: int


def inspect_checkpoint(path: str | os.PathLike) -> CheckpointInfo:
    """Read the headers of a checkpoint (file, index or directory); CheckpointError where they are damaged."""
    sizes: dict[str, tuple[list[int], str, int]] = {}
    headers: dict[Path, dict[str, str]] = {}
    for file in checkpoint_files(path):
        with open_file(file) as f, readable_tensors(file):
            headers[file] = f.metadata() or {}
            for key in f.keys():  # noqa: SIM118
                part = f.get_slice(key)
                sizes[key] = list(part.get_shape()), part.get_dtype(), nbytes_of(part)
    out: list[TensorInfo] = []
    for name, text in read_header(headers).entries.items():
        entry = parse_entry(name, text)
        data = entry["_data"]
        sizes.pop(name, None)  # the guard that save_model writes lies under the weight's own name
        code_bytes = sizes.get(data_key(name, "qdata"), ([], "", 0))[2]
        nbytes = sum(sizes.pop(key, ([], "", 0))[2] for key in keys_of(name, entry))
        settings = tuple(data[k] for k in ("nbits", "group_size", "axis", "format"))
        out.append(TensorInfo(name, "hqq", data["shape"], data["dtype"], *settings, nbytes, code_bytes))  # type: ignore[call-arg]
    out += [TensorInfo(n, "dense", s, d, None, None, None, None, b, b) for n, (s, d, b) in sizes.items()]
    out.sort(key=lambda t: t.name)
    return CheckpointInfo(out, sum(t.nbytes for t in out))
