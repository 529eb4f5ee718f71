"""The metadata of a checkpoint's files: format version, names, aliases, and whether all files are of one save."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtensor.serialization.layout import CheckpointError, read_json
from hqqtensor.tensor.validate import is_whole

VERSION = 1
"""Of the format. A later one is refused: what it means is not known here."""
_KEY = "hqqtensor"


@dataclass(frozen=True)
class Header:
    """``entries``: the JSON entry of each quantized weight. ``aliases``: {name: the name it is stored under}.
    ``hidden``: non-persistent buffers."""

    entries: dict[str, str]
    aliases: dict[str, str]
    hidden: set[str]


def file_metadata(
    entries: Mapping[str, str], aliases: Mapping[str, str], hidden: Sequence[str], save: str | None = None
) -> dict[str, str]:
    """What is written into every file of one save. ``entries``: of all parameters and buffers; others as in ``Header``.

    save: an identity that no save of other numbers has, so that ``read_header`` can refuse shards of two; None makes
    one.
    """
    shared: dict[str, Any] = {"version": VERSION, "save": save or secrets.token_hex(8)}
    shared |= {"aliases": dict(aliases), "non_persistent_buffers": list(hidden)}
    return {"format": "pt", **entries, "tensor_names": json.dumps(list(entries)), _KEY: json.dumps(shared)}


def is_of_a_save(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata was written by ``save_model`` or what shares its format."""
    return _KEY in metadata


def read_header(headers: Mapping[Path, Mapping[str, str]]) -> Header:
    """The header of a checkpoint from the metadata of each of its files.

    CheckpointError for metadata that is damaged or of a later version, and where files of two saves are mixed: their
    names are often the same, and nothing else would tell.
    """
    saves: dict[Any, Path] = {}
    merged: dict[str, str] = {}
    shared: dict[str, Any] = {}
    for file, header in headers.items():
        of_file = _read_shared(file, header)
        saves.setdefault(of_file.get("save"), file)
        shared = of_file or shared
        merged |= header
    if len(saves) > 1:
        first, second = sorted(saves.values())[:2]
        raise CheckpointError(
            f"{first} and {second.name} are of two different saves: one was interrupted or ran at the same time as "
            "another; save the model again"
        )
    where = next(iter(headers), Path())
    names = read_json(merged.get("tensor_names", "[]"), f"{where}: tensor_names")
    if not _are_names(names):
        raise CheckpointError(f"{where}: tensor_names in the metadata is no list of names")
    entries = {name: merged[name] for name in names if '"HQQTensor"' in merged.get(name, "")}
    return Header(entries, shared.get("aliases", {}), set(shared.get("non_persistent_buffers", ())))


def _read_shared(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The entry that belongs to no single tensor, checked; empty where the file has none."""
    if _KEY not in header:
        return {}
    shared = read_json(header[_KEY], f"{file}: the {_KEY} entry of the metadata")
    shared = shared if isinstance(shared, dict) else {}
    version, aliases = shared.get("version", 1), shared.get("aliases")
    if not is_whole(version) or not 0 < version <= VERSION:
        raise CheckpointError(
            f"{file}: has format version {version!r}; this hqqtensor reads up to {VERSION}, install a later one"
        )
    good = isinstance(aliases, dict) and _are_names(list(aliases.values()))
    if (
        not good
        or not _are_names(shared.get("non_persistent_buffers"))
        or not isinstance(shared.get("save"), str | None)
    ):
        raise CheckpointError(f"{file}: the {_KEY} entry of the metadata is damaged")
    return shared


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
