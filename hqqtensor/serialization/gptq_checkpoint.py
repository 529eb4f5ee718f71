"""Checkpoints of GPTQ and AWQ: which files are such, their settings, and all of their weights as HQQTensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hqqtensor.serialization.gptq_layer import PackedSettings, read_packed
from hqqtensor.serialization.layout import CheckpointError, read_json
from hqqtensor.tensor.validate import is_whole

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WIDTHS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "awq": (4,)}
ACT_ORDER = ("error", "dense")
"""What becomes of layers whose groups are in an order of their own: an error, or dense weights."""


def is_packed(keys: Iterable[str]) -> bool:
    """Whether tensor names are those of GPTQ or AWQ."""
    return any(key.rpartition(".")[2] == "qweight" for key in keys)


def from_packed(tensors: Mapping[str, Tensor], directory: Path, act_order: str = "error") -> dict[str, Tensor]:
    """Layers under ``NAME.qweight`` and what belongs to them become ``NAME.weight``; other tensors stay.

    directory: where ``config.json`` with a ``quantization_config`` (or an older ``quantize_config.json`` or
    ``quant_config.json``) lies: widths and group size are in no tensor.
    """
    if act_order not in ACT_ORDER:
        raise ValueError(f"act_order must be one of {list(ACT_ORDER)}, got {act_order!r}")
    settings = read_settings(directory)
    layers: dict[str, dict[str, Tensor]] = {}
    out: dict[str, Tensor] = {}
    names = {key.rpartition(".")[0] for key in tensors if is_packed([key])}
    for key, tensor in tensors.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in names and leaf in _PARTS:
            layers.setdefault(prefix, {})[leaf] = tensor
        else:
            out[key] = tensor
    for prefix, entries in layers.items():
        name = f"{prefix}.weight" if prefix else "weight"
        if name in out:
            raise CheckpointError(f"{name}: stored both dense and packed")
        out[name] = read_packed(prefix or "weight", entries, settings, act_order)
    return out


def read_settings(directory: Path) -> PackedSettings:
    """The settings of a GPTQ or AWQ model directory; CheckpointError for those that are missing or not read."""
    file_and_content = _settings_file(directory)
    if file_and_content is None:
        raise CheckpointError(
            f"{directory}: its tensors are GPTQ's or AWQ's, but no config.json, quantize_config.json or "
            "quant_config.json says in how many bits and groups"
        )
    file, config = file_and_content

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise CheckpointError(f"{file}: {what}")

    method = config.get("quant_method", "awq" if file.name == "quant_config.json" else "gptq")
    need(method in ("gptq", "awq"), f"quant_method {method!r} is not read here; gptq and awq are")
    awq = method == "awq"
    keys = ("checkpoint_format", "format", *(["version"] if awq else []))
    form = str(_first(config, *keys) or ("gemm" if awq else "gptq")).lower()
    allowed = ("gemm",) if awq else ("gptq", "gptq_v2")
    need(form in allowed, f"the {method} format {form!r} is not read; {' and '.join(allowed)} are")
    need(not config.get("is_marlin_format"), "weights repacked for Marlin are not read")
    need(config.get("pack_dtype", "int32") in ("int32", "torch.int32"), "codes must be packed in int32")
    dynamic = config.get("dynamic") or {}
    # "-:PATTERN" leaves modules dense, which their tensors say; anything else changes how tensors are to be read.
    need(
        isinstance(dynamic, dict) and all(str(k).startswith("-:") for k in dynamic),
        "settings by module (dynamic) are not read",
    )
    version = "awq" if awq else form
    bits, size = _first(config, "bits", "w_bit"), _first(config, "group_size", "q_group_size")
    need(is_whole(bits) and bits in _WIDTHS[version], f"bits must be one of {list(_WIDTHS[version])}, got {bits!r}")
    need(is_whole(size) and (size == -1 or size > 0), f"group_size must be -1 or positive, got {size!r}")
    return PackedSettings(version, bits, None if size == -1 else size)


def _settings_file(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        content = read_json(file.read_bytes(), f"{file}: the file")
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: is no JSON object")
        config = content.get("quantization_config") if name == "config.json" else content
        if isinstance(config, dict):
            return file, config
    return None


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)
