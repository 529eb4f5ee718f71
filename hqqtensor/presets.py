"""Presets by name, and the choice of one for a model and a memory budget."""

import re
from dataclasses import dataclass

from torch import nn

from hqqtensor.config import HqqConfig, hqq_weight_only
from hqqtensor.formats import get_format
from hqqtensor.selection import choose
from hqqtensor.stored_size import META_GROUP, stored_bytes


class UnknownPresetError(KeyError):
    """No preset has this name; the message names those that there are."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows the repr of its argument


class Presets(dict[str, HqqConfig]):
    """Presets by name: a dict whose ``presets[name]`` raises UnknownPresetError (a KeyError) for an unknown name."""

    def __missing__(self, name: object) -> HqqConfig:
        raise UnknownPresetError(
            f"there is no preset {name!r}, only {', '.join(self)}; "
            "for other settings use hqq_weight_only(nbits, group_size)"
        )


PRESETS = Presets(
    {
        "8": hqq_weight_only(8, embedding_nbits=8),
        "6": hqq_weight_only(6, embedding_nbits=8),
        "4": hqq_weight_only(4, embedding_nbits=8),
        "3": hqq_weight_only(3, embedding_nbits=6),
        "2": hqq_weight_only(2, embedding_nbits=6),
        "8/64": hqq_weight_only(8, 64),
        "4/64": hqq_weight_only(4, 64),
        "4/128": hqq_weight_only(4, 128),
        "3/64": hqq_weight_only(3, 64),
        "2/64": hqq_weight_only(2, 64),
        "2/16": hqq_weight_only(2, 16, quant_scale=True, quant_zero=True, meta_nbits=4),
        "1/32": hqq_weight_only(1, 32),
    }
)
"""Presets named by bits are the recommended settings, embedding and output layer included. Those named bits/group size
have plain scales and leave both dense; 2/16 stores its many scales and zero points in 4 bits."""

BYTE_UNITS: dict[str, float] = {
    "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
"""Bytes of each unit of a size."""

_BEST_FIRST = ("8", "6", "4", "3", "2", "1/32")


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
    """Stored bits a weight of a large matrix, scales and zero points counted, float16 where they are not quantized.

    The entries of a learned codebook are not counted: 16 of a tensor are nothing, 16 of each row depend on its length.
    ``stored_size.stored_bytes`` is exact for a given shape.
    """
    assert config.group_size is not None
    widths = [config.scale_nbits]
    if get_format(config.format).has_zero_point:
        widths.append(config.zero_nbits)
    meta_bits = 2 * 32 / META_GROUP  # a float32 scale and zero point for each group of quantized scales
    return config.nbits + sum(16.0 if nbits is None else nbits + meta_bits for nbits in widths) / config.group_size


def get_optimal_quant_config(
    model_size_or_model: nn.Module | int | float | str, memory_budget: int | float | str | None = None
) -> OptimalConfig:
    """The best preset whose weights fit.

    model_size_or_model: a model, a number of parameters, or text such as "7B". memory_budget: bytes, or text such
    as "6GB" or "4GiB"; None asks for the recommended preset: 8 bits below a billion parameters, where small
    weights are cheap and small models are hurt most, else 4 bits. ValueError where nothing fits. The bytes of a model
    are those of its weights with each preset; of a number, all parameters count as layers.
    """
    if isinstance(model_size_or_model, nn.Module):
        count: float = sum(p.numel() for p in model_size_or_model.parameters())
        sizes = {name: _model_bytes(model_size_or_model, PRESETS[name]) for name in _BEST_FIRST}
    else:
        count = parse_size(model_size_or_model, "model size", {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12})
        sizes = {name: int(count * bits_per_weight(PRESETS[name]) / 8) for name in _BEST_FIRST}
    if memory_budget is None:
        name = "8" if count < 1e9 else "4"
        size = "under" if count < 1e9 else "at least"
        return OptimalConfig(name, PRESETS[name], sizes[name], f"recommended for {size} a billion parameters")
    budget = parse_size(memory_budget, "memory budget", BYTE_UNITS)
    for name in _BEST_FIRST:
        if sizes[name] <= budget:
            reason = f"the best preset within {budget / 1e9:.2f} GB for {count / 1e9:.3g} billion parameters"
            return OptimalConfig(name, PRESETS[name], sizes[name], reason)
    raise ValueError(f"no preset fits {budget / 1e9:.2f} GB: the smallest, 1/32, takes {sizes['1/32'] / 1e9:.2f} GB")


def _model_bytes(model: nn.Module, config: HqqConfig) -> int:
    """Bytes of the parameters of ``model`` after ``quantize_(model, config)``; it may be on the meta device."""
    choices, _ = choose(model, config)
    quantized = {id(choice.weight): stored_bytes(choice.matrix_shape(), choice.settings) for choice in choices}
    return sum(quantized.get(id(p), p.nbytes) for p in model.parameters())


def parse_size(value: int | float | str, what: str, units: dict[str, float]) -> float:
    """A number, or text of a number and one of ``units`` (name in capitals: factor); ValueError, naming ``what``."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in units:
            raise ValueError(f"{what} must be a number with one of the units {[u for u in units if u]}, got {value!r}")
        value = float(match[1]) * units[match[2].upper()]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{what} must be a positive number, got {value!r}")
    return value
