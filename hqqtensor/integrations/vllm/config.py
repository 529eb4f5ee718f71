"""The quantization config "hqqtensor" of vLLM."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from hqqtensor.integrations import patches
from hqqtensor.integrations.transformers import QUANT_METHOD
from hqqtensor.integrations.vllm import files
from hqqtensor.integrations.vllm.embedding import EmbeddingMethod
from hqqtensor.integrations.vllm.experts import ExpertsMethod
from hqqtensor.integrations.vllm.linear import LinearMethod
from hqqtensor.integrations.vllm.loading import Gathering, Online
from hqqtensor.integrations.vllm.settings import ROUTERS, read_config
from hqqtensor.serialization.files import checkpoint_files


class VllmConfig(QuantizationConfig):
    """What vLLM asks of a quantization method. Stored weights are what their files say; the settings here are for dense
    weights of a checkpoint that is not quantized (``--quantization hqqtensor``)."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.settings = read_config(settings or {})
        self.gathering = Gathering()

    def get_name(self) -> Any:
        """The name of the method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that Triton compiles for."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file: config.json has the settings."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmConfig":
        """From the ``quantization_config`` of a config.json, or of ``--hf-overrides``."""
        return cls(config)

    @classmethod
    def from_config_dict_json(cls, text: str) -> "VllmConfig":
        """From ``--hf-overrides '{"quantization_config_dict_json": "{...}"}'``."""
        return cls(json.loads(text))

    @classmethod
    def from_config_file(cls, path: str) -> "VllmConfig":
        """From ``--hf-overrides '{"quantization_config_file": "settings.json"}'``."""
        return cls(json.loads(Path(path).read_text()))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Let vLLM's cache of compiled graphs tell checkpoints apart by the settings of every weight.

        Graphs hold these settings as constants, and config.json does not say all of them.
        """
        entry = getattr(hf_config, "quantization_config", None)
        if isinstance(entry, dict) and os.path.isdir(model_name):
            entry["fingerprint"] = files.fingerprint(checkpoint_files(model_name))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer, quantized or not: what its weights are is known when they have been loaded."""
        online = Online(self.settings, self.packed_modules_mapping, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod(online, self.gathering)
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer.moe_config, online, self.gathering)
        if isinstance(layer, LinearBase):
            is_router = prefix.rpartition(".")[2] in ROUTERS
            return UnquantizedLinearMethod() if is_router else LinearMethod(online, self.gathering)
        return None


def install() -> None:
    """Register the config, and let vLLM's loader read our files."""
    register_quantization_config(QUANT_METHOD)(VllmConfig)
    files.install()
    patches.require("vllm.")
