"""Sensitivities as they lie in a file: everything that it claims is checked before it is used."""

import json
import sys
from pathlib import Path
from typing import Any

from hqqtensor.config import HqqConfig

VERSION = 1
METHODS = ("weights", "outputs")


def read_sensitivities(path: Path) -> dict[str, Any]:
    """``method``, ``candidates`` and ``layers`` of a file that ``Sensitivity.save`` wrote.

    ValueError naming the file and the entry that is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        _check(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sensitivity file of hqqtensor: {error}") from None
    return {name: data[name] for name in ("method", "candidates", "layers")}


def _check(data: Any) -> None:
    _need(isinstance(data, dict), f"it holds a {type(data).__name__}, not an object")
    _need(data.get("version") == VERSION, f"version must be {VERSION}, got {data.get('version')!r}")
    _need(data.get("method") in METHODS, f"method must be one of {list(METHODS)}, got {data.get('method')!r}")
    candidates, layers = data.get("candidates"), data.get("layers")
    _need(isinstance(candidates, list) and len(candidates) > 0, "candidates must be a list of settings")
    _need(isinstance(layers, dict), "layers must be an object with an entry for each layer")
    for i, candidate in enumerate(candidates):
        _need(isinstance(candidate, dict), f"candidates[{i}] must be an object of settings, got {candidate!r}")
        try:
            HqqConfig.from_dict(candidate)
        except (ValueError, TypeError) as error:
            raise ValueError(f"candidates[{i}]: {error}") from None
    for name, entry in layers.items():
        _check_layer(f"layers[{name!r}]", entry, len(candidates))


def _check_layer(where: str, entry: Any, count: int) -> None:
    _need(isinstance(entry, dict), f"{where} must be an object, got {entry!r}")
    _need(isinstance(entry.get("key"), str), f"{where}: key must be a text, got {entry.get('key')!r}")
    for part in ("bytes", "loss"):
        values = entry.get(part)
        fits = isinstance(values, list) and len(values) == count
        _need(fits, f"{where}: {part} must be a list of {count} numbers, one for each candidate, got {values!r}")
    pairs = list(zip(entry["bytes"], entry["loss"], strict=True))
    _need(any(size is not None for size, _ in pairs), f"{where}: no candidate fits the layer")
    for i, (size, loss) in enumerate(pairs):
        if size is None and loss is None:  # the candidate does not fit the layer
            continue
        whole = isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**62
        _need(whole, f"{where}: bytes[{i}] must be a positive whole number, got {size!r}")
        number = isinstance(loss, (int, float)) and not isinstance(loss, bool)
        finite = number and 0 <= loss <= sys.float_info.max
        _need(finite, f"{where}: loss[{i}] must be a finite number from 0, got {loss!r}")


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what if len(what) < 500 else f"{what[:500]} ...")
