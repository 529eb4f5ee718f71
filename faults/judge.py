"""Looks at what a run left: which of two whole states, and whether it said so in one clear line."""

import builtins
import json
import re
from dataclasses import dataclass
from pathlib import Path

_TOKEN = re.compile(r"-[0-9a-f]{8}(-\d{5}-of-\d{5})")
_DOCUMENTED = ("CommandError", "UsageError", "CheckpointError", "TransferError", "ResumeError", "OSError", "TooLittle")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NOTES = ("what is finished is kept in", "going on with what an interrupted run left", "hqqtensor: ")
_WARNING = re.compile(r".+:\d+: \w*Warning: |  ")
"""A warning, or the line of a program that Python prints below one."""

State = dict[str, bytes]


def state_of(place: Path) -> tuple[State, set[str]]:
    """The bytes of a file, or of a directory's files by name, and what lies in the directory and is no part of it.

    No part of a checkpoint: folders of savers, shards that its index does not name, and an index or shards beside a
    ``model.safetensors``, which comes before them.
    """
    if place.is_file():
        return {"": place.read_bytes()}, set()
    files = {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
    index = files.get(_INDEX, b"{}")
    shards = set() if _WHOLE in files else {*json.loads(index).get("weight_map", {}).values()}
    strays = {name for name in files if "-of-" in name and name not in shards}
    strays |= {_INDEX} if _WHOLE in files and _INDEX in files else set()
    inside = {name for name in files if ".hqqtensor-" in name.partition("/")[0]}
    inside |= {path.name for path in place.glob(".*.hqqtensor-*")} if place.is_dir() else set()
    return {name: data for name, data in files.items() if name not in strays | inside}, strays | inside


def canonical(state: State) -> State:
    """``state`` without what differs between two equal saves: their identity, and the names of shards."""
    result = {}
    for name, data in state.items():
        if name.endswith(".safetensors"):
            data = _without_save(data)
        elif name.endswith(".index.json"):
            data = _TOKEN.sub(r"\1", data.decode()).encode()
        elif data.startswith(b"HQQPACK"):
            data = b"a stream of so many bytes: " + str(len(data) // 64).encode()  # deflated, it has the identity
        result[_TOKEN.sub(r"\1", name)] = data
    return result


def _without_save(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        shared = json.loads(header["__metadata__"]["hqqtensor"])
        shared.pop("save")
        header["__metadata__"]["hqqtensor"] = shared
    except (ValueError, KeyError):
        return data
    return json.dumps(header, sort_keys=True).encode() + data[8 + length :]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, negative for a signal; what it printed."""

    code: int
    stdout: str
    stderr: str


def complaint(ended: Ended) -> str:
    """What is wrong with what a run printed that ended with an error; empty where nothing is."""
    if ended.stdout:
        return f"printed as if it were done: {ended.stdout.strip()[-200:]}"
    text, classes = _without_tracebacks(ended.stderr)
    lines = [line for line in text.splitlines() if line and not line.startswith(_NOTES) and not _WARNING.match(line)]
    if any(line.startswith("hqqtensor ") for line in lines):  # causes that have no traceback
        lines = [line for line in lines if not re.match(r"[A-Za-z.]+Error: ", line)]
    if len(lines) != 1:
        return f"{len(lines)} lines of error: {text[-600:]}"
    if ended.code == 130:
        return ""
    kind = classes[-1] if classes else lines[0].partition(":")[0]
    kind = "CommandError" if kind.startswith("hqqtensor ") else kind  # a command's line without a traceback
    if not kind.rpartition(".")[2].endswith(_DOCUMENTED) and kind not in _OS_ERRORS:
        return f"an error of class {kind}: {lines[0]}"
    if not re.search(r"/|\.safetensors|\.json|\.md|\.pt", lines[0]):
        return f"names no file: {lines[0]}"
    return ""


_OS_ERRORS = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, OSError)}


def _without_tracebacks(text: str) -> tuple[str, list[str]]:
    """``text`` without tracebacks, and the classes of the errors at their ends (HQQTENSOR_TRACEBACK=1 prints them)."""
    lines: list[str] = []
    classes: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line[0].isspace():
            classes.append(line.partition(":")[0])
            inside = False
        elif not inside and line and not line.startswith(("During handling of the above", "The above exception was")):
            lines.append(line)
    return "\n".join(lines), classes
