"""HqqConfig as transformers wants it, and the translation of transformers' own HqqConfig."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils import quantization_config as theirs
from transformers.utils.import_utils import is_hqq_available

import hqqtensor.config
from hqqtensor.integrations import patches
from hqqtensor.integrations.transformers import QUANT_METHOD
from hqqtensor.integrations.versions import TRANSFORMERS
from hqqtensor.quantize import check_without_names
from hqqtensor.selection import tag_matches

_NOTES = ("quant_method", "source")
"""Entries of ``quantization_config`` in a config.json that are no settings."""


class HqqConfig(hqqtensor.config.HqqConfig, theirs.QuantizationConfigMixin):
    """``hqqtensor.HqqConfig`` with what transformers asks of a quantization config; equal in every setting."""

    # transformers' enum of methods is closed.
    quant_method = QUANT_METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The settings and ``quant_method``: what config.json holds."""
        return {"quant_method": QUANT_METHOD, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read ``to_dict``'s form, with ``kwargs`` on top; an unknown setting raises ValueError."""
        settings = {k: v for k, v in {**data, **kwargs}.items() if k not in _NOTES}
        config = super().from_dict(settings)
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def of(cls, config: Any) -> "HqqConfig":
        """Ours from a plain ``hqqtensor.HqqConfig``."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def from_transformers(config: Any, model: nn.Module | None = None) -> HqqConfig:
    """Ours from transformers' ``HqqConfig``; what has no counterpart raises ValueError.

    Its ``dynamic_config`` names linear tags: a module's name without "model", "layers" and numbers. Layers that it
    does not name are left alone, as in the hqq library. With a ``model``, tags that are no run of the parts of the
    names that they stand for are replaced by those names.
    """
    quant, skip = config.quant_config, list(config.skip_modules or [])
    if not isinstance(quant, dict) or not all(v is None or isinstance(v, (dict, bool)) for v in quant.values()):
        raise ValueError(f"quant_config of an hqq model must be a dict of hqq's parameters, got {quant!r}")
    options: dict[str, Any] = {"skip_modules": [n for tag in skip for n in _names(tag, model)]}
    if "weight_quant_params" in quant:
        return HqqConfig(weight_quant_params=_whole_bits(quant), **options)
    layers: dict[str, Any] = {"*": None}
    for tag, entry in quant.items():
        settings = None if entry is None else {"weight_quant_params": _whole_bits(entry)}
        layers |= dict.fromkeys(_names(tag, model), settings)
    return HqqConfig(dynamic_config=layers, **options)


def _whole_bits(quant: dict[str, Any]) -> dict[str, Any]:
    """hqq keeps its 1.58 bits (three levels) in 2-bit codes."""
    weight = quant["weight_quant_params"]
    return {**quant, "weight_quant_params": {**weight, "nbits": 2}} if weight.get("nbits") == 1.58 else quant


def _names(tag: str, model: nn.Module | None) -> list[str]:
    if model is None:
        return [tag]
    names = [name for name, _ in model.named_modules() if _linear_tag(name) == tag]
    return [tag] if all(tag_matches(tag, name) for name in names) else names


def _linear_tag(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def install() -> None:
    """Give our config its ``quant_method``, and check or complete two of transformers' configs."""
    hqqtensor.config.HqqConfig.quant_method = QUANT_METHOD  # type: ignore[attr-defined]
    module = "transformers.utils.quantization_config"
    reason = "transformers.HqqConfig without the hqq package"
    patches.wrap(module, "HqqConfig.__init__", _without_hqq, reason, TRANSFORMERS)
    reason = "refusing settings by name in a TorchAoConfig"
    patches.wrap(module, "TorchAoConfig.post_init", _checked, reason, TRANSFORMERS)


def _without_hqq(init: Callable) -> Callable:
    """``transformers.HqqConfig.__init__`` that does not need the hqq package."""

    def __init__(
        self: Any, nbits: int = 4, group_size: int | None = 64, view_as_float: bool = False, axis: int | None = None,
        dynamic_config: dict[str, Any] | None = None, skip_modules: list[str] = ["lm_head"], **kwargs: Any,  # noqa: B006
    ) -> None:  # fmt: skip
        if is_hqq_available():
            init(self, nbits, group_size, view_as_float, axis, dynamic_config, skip_modules, **kwargs)
            return
        axis = 1 if axis is None else axis
        if axis not in (0, 1):
            raise ValueError("Invalid axis value. Only 0 and 1 are allowed.")
        if dynamic_config is None:
            self.quant_config = _hqq_params(nbits, group_size, view_as_float=view_as_float, axis=axis)
        else:
            self.quant_config = {tag: _hqq_params(**entry) for tag, entry in dynamic_config.items()}
        self.quant_method = theirs.QuantizationMethod.HQQ
        self.skip_modules = skip_modules
        self.post_init()

    return __init__


def _checked(post_init: Callable) -> Callable:
    """``TorchAoConfig.post_init`` that refuses what torchao could not follow, before a model is loaded."""

    def checked(self: Any) -> None:
        post_init(self)
        by_name = getattr(self.quant_type, "fqn_to_config", None) or {"": self.quant_type}
        for config in by_name.values():
            if isinstance(config, hqqtensor.config.HqqConfig):
                check_without_names(config)

    return checked


def _hqq_params(
    nbits: float = 4, group_size: int | None = 64, quant_zero: bool = False, quant_scale: bool = False,
    offload_meta: bool = False, view_as_float: bool = False, axis: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The dict that hqq's ``BaseQuantizeConfig`` makes."""
    weight = {
        "nbits": nbits, "channel_wise": True, "group_size": group_size, "optimize": True,
        "round_zero": nbits == 4, "axis": axis, "view_as_float": view_as_float,
    }  # fmt: skip
    meta = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    return {
        "weight_quant_params": weight,
        "scale_quant_params": meta if quant_scale else None,
        "zero_quant_params": {**meta, "channel_wise": False, "group_size": None} if quant_zero else None,
        "offload_meta": offload_meta,
    }
