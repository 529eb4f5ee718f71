"""Presets by name, and the choice of one for a model and a memory budget."""

import re
from dataclasses import dataclass

from torch import nn

from hqqtensor.config import HqqConfig, hqq_weight_only
from hqqtensor.formats import get_format

PRESETS: dict[str, HqqConfig] = {
    "8/64": hqq_weight_only(8, 64),
    "4/64": hqq_weight_only(4, 64),
    "4/128": hqq_weight_only(4, 128),
    "3/64": hqq_weight_only(3, 64),
    "2/64": hqq_weight_only(2, 64),
    "2/16": hqq_weight_only(2, 16, quant_scale=True, quant_zero=True, meta_nbits=4),
    "1/32": hqq_weight_only(1, 32),
}
"""Presets named bits/group size, best quality first; 2/16 keeps its many scales in 4 bits."""

BYTE_UNITS: dict[str, float] = {
    "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_ORDER = ("8/64", "4/64", "4/128", "3/64", "2/16", "2/64", "1/32")


@dataclass(frozen=True)
class OptimalConfig:
    """The preset chosen, its name, the bytes it is estimated to take, and why it was chosen."""

    name: str
    config: HqqConfig
    estimated_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name} (about {self.estimated_bytes / 1e9:.2f} GB): {self.reason}"


def bits_per_weight(config: HqqConfig) -> float:
    """Stored bits a weight, scales and zero points counted, for float16 metadata and whole groups.

    The entries of a learned codebook are not counted: 16 of a tensor are nothing, 16 of each row depend on its length.
    """
    assert config.group_size is not None
    quantized = [config.quant_scale]
    if get_format(config.format).has_zero_point:
        quantized.append(config.quant_zero)
    return config.nbits + sum(config.meta_nbits + 0.5 if q else 16.0 for q in quantized) / config.group_size


def get_optimal_quant_config(
    model_size_or_model: nn.Module | int | float | str, memory_budget: int | float | str | None = None
) -> OptimalConfig:
    """The best preset whose weights fit.

    model_size_or_model: a model, a number of parameters, or text such as "7B". memory_budget: bytes, or text such
    as "6GB" or "4GiB"; None asks for the recommended preset: 8 bits below a billion parameters, where small
    weights are cheap and small models are hurt most, else 4 bits. ValueError where nothing fits.
    """
    count = (
        sum(p.numel() for p in model_size_or_model.parameters())
        if isinstance(model_size_or_model, nn.Module)
        else parse_size(model_size_or_model, "model size", {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12})
    )
    sizes = {name: int(count * bits_per_weight(PRESETS[name]) / 8) for name in _ORDER}
    if memory_budget is None:
        name = "8/64" if count < 1e9 else "4/64"
        size = "under" if count < 1e9 else "at least"
        return OptimalConfig(name, PRESETS[name], sizes[name], f"recommended for {size} a billion parameters")
    budget = parse_size(memory_budget, "memory budget", BYTE_UNITS)
    for name in _ORDER:
        if sizes[name] <= budget:
            reason = f"the best preset within {budget / 1e9:.2f} GB for {count / 1e9:.3g} billion parameters"
            return OptimalConfig(name, PRESETS[name], sizes[name], reason)
    raise ValueError(f"no preset fits {budget / 1e9:.2f} GB: the smallest, 1/32, takes {sizes['1/32'] / 1e9:.2f} GB")


def parse_size(value: int | float | str, what: str, units: dict[str, float]) -> float:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in units:
            raise ValueError(f"{what} must be a number with one of the units {[u for u in units if u]}, got {value!r}")
        value = float(match[1]) * units[match[2].upper()]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{what} must be a positive number, got {value!r}")
    return value
