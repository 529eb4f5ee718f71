"""config.json of a model directory, read and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqtensor.integrations.transformers import QUANT_METHOD
from hqqtensor.serialization.layout import CheckpointError, InputError, read_json


def read_settings(directory: Path) -> dict[str, Any]:
    """The contents of config.json. InputError where there is none, CheckpointError where it is damaged."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory")
    if not path.is_file():
        raise InputError(f"{directory} is not a model directory: it has no config.json")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    settings = read_json(text, str(path))
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return settings


def quantization_entry(settings: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` that hqqtensor wrote; None for a dense model, InputError for another's."""
    entry = settings.get("quantization_config")
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if method != QUANT_METHOD:
        raise InputError(f"{directory} is quantized with {method!r}, not with {QUANT_METHOD!r}")
    return entry


def quantized_settings(directory: Path) -> dict[str, Any]:
    """``read_settings`` of a model that hqqtensor quantized; InputError for any other."""
    settings = read_settings(directory)
    if quantization_entry(settings, directory) is None:
        raise InputError(f"{directory} is not quantized: its config.json has no quantization_config")
    return settings
