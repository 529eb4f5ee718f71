"""With which settings a dense weight is quantized while vLLM loads it."""

from hqqtensor.config import HqqConfig
from hqqtensor.presets import PRESETS
from hqqtensor.selection import OUTPUT_LAYER, skipped, tag_matches

NOTES = ("quant_method", "source", "fingerprint")
"""Entries of a config.json's ``quantization_config`` that are no settings."""
ROUTERS = ("gate", "router")
"""Last parts of the names of layers that choose experts; they stay dense, as in ``quantize_``."""


def default_config() -> HqqConfig:
    """The settings of ``hqqtensor quantize`` without options: 4 bits, embedding and output layer 8 bits."""
    return PRESETS["4"]


def read_config(settings: dict[str, object]) -> HqqConfig:
    """The config of a ``quantization_config``; ValueError for a setting that there is not, or a bad value.

    Settings that are not given are those of HqqConfig. Without any, ``default_config``.
    """
    given = {name: value for name, value in settings.items() if name not in NOTES}
    return HqqConfig.from_dict(given) if given else default_config()


def names_of_rows(prefix: str, packed: dict[str, list[str]], place: int | None) -> str:
    """The name that a weight of a joined layer has in the checkpoint.

    prefix: vLLM's name of the layer, as ``model.layers.0.self_attn.qkv_proj``. packed: by the last part of such a name,
    those of the layers that were joined. place: which of them, None for a layer that is stored as one.
    """
    parent, dot, leaf = prefix.rpartition(".")
    members = packed.get(leaf, [])
    return f"{parent}{dot}{members[place]}" if place is not None and place < len(members) else prefix


def settings_for(config: HqqConfig, name: str, in_features: int, is_embedding: bool) -> HqqConfig | None:
    """The settings of the weight of layer ``name``; None leaves it dense.

    is_embedding: whether it is the input embedding or the output layer. Those are quantized where ``embedding_nbits``
    or a tag of ``dynamic_config`` says so.
    """
    tags = [tag for tag in config.dynamic_config or {} if tag_matches(tag, name)]
    skip = skipped(name, config)
    if skip is not None and not (is_embedding and skip == OUTPUT_LAYER and config.embedding_nbits is not None):
        return None
    if tags:
        return config.for_tag(max(tags, key=lambda tag: (tag.count("."), len(tag))))
    if is_embedding:
        return config.for_embedding(in_features)
    return None if name.rpartition(".")[2] in ROUTERS else config.for_tag(None)
