"""The quantizer that transformers calls while it loads and saves a model."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_hqq_available

import hqqtensor.config
from hqqtensor.integrations import patches
from hqqtensor.integrations.transformers import QUANT_METHOD, offload
from hqqtensor.integrations.transformers.config import HqqConfig, from_transformers
from hqqtensor.integrations.versions import TRANSFORMERS
from hqqtensor.presets import bits_per_weight
from hqqtensor.quantize import dequantize_, show_quantized
from hqqtensor.selection import Choice, check_shapes, choose
from hqqtensor.serialization.hqq_checkpoint import read_layers
from hqqtensor.serialization.hqq_layer import LAYER_KEYS
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.serialization.load import read_files
from hqqtensor.serialization.save import split_state
from hqqtensor.tensor import HQQTensor

_PARTS = r"(^|\.)_\w+_(qdata|scale|zero_point|act_pre_scale)$"
"""Stored tensors that belong to a quantized weight; the quantizer reads them itself."""


class HQQTensorHfQuantizer(HfQuantizer):
    """Quantizes weight by weight while transformers loads them, or reads a checkpoint that is quantized already.

    Serves ``quant_method`` "hqqtensor" and, in the place of transformers' own, "hqq" (see ``serve_hqq``).
    """

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        self.hqq_config = None
        if isinstance(quantization_config, hqqtensor.config.HqqConfig):
            config = HqqConfig.of(quantization_config)
        else:
            self.hqq_config = quantization_config
            config = from_transformers(quantization_config)
        super().__init__(config, **kwargs)
        self.plan: dict[str, Choice] = {}
        self.ready: dict[str, HQQTensor] = {}
        self.packed_key = ""
        self.missing: set[str] = set()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.hqq_config is not None:
            self.quantization_config = from_transformers(self.hqq_config, model)
        self._check_distribution(getattr(model.config, "distributed_config", None))
        # transformers builds the model under torch.device("meta"); what is read here is real.
        with torch.device("cpu"):
            if self.pre_quantized:
                self._read(model, checkpoint_files)
            else:
                choices, _ = choose(model, self.quantization_config, ties=model.all_tied_weights_keys)
                if not choices:
                    raise ValueError("nothing to quantize: no linear layer outside skip_modules")
                check_shapes(choices)
                self.plan = {name: choice for choice in choices for name in choice.names}

    def _check_distribution(self, wanted: Any) -> None:
        """ValueError for a ``DistributedConfig`` whose parameters could not be quantized, or sharded, as they load."""
        if wanted is None:
            return
        if (wanted.fsdp_size or 1) > 1:
            raise ValueError(
                f"fsdp_size={wanted.fsdp_size}: a quantized model is not loaded into FSDP's shards; load it whole, "
                "then call torch.distributed.fsdp.fully_shard on its layers"
            )
        if not self.pre_quantized:
            raise ValueError(
                f"tp_size={wanted.tp_size}: a model is not quantized while it is distributed; quantize and save it "
                "once, then load the quantized directory with the same DistributedConfig"
            )

    def _read(self, model: Any, files: Sequence[str] | None) -> None:
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise CheckpointError(f"a quantized model is read from safetensors files, got {files}")
        if self.hqq_config is None:
            state, _, hidden = read_files(files)
            ignore = [_PARTS, *(re.escape(name) + "$" for name in sorted(hidden))]
            self.ready = {name: t for name, t in state.items() if isinstance(t, HQQTensor)}
        else:
            self.ready = read_layers(files)
            ignore = [rf"\.({'|'.join(sorted(LAYER_KEYS))})$"]
            self.packed_key = "W_q"
        if not self.ready:
            raise CheckpointError("config.json says that the model is quantized; its files hold no quantized weight")
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignore}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Let a weight's packed codes stand for the weight; keys go through the model's renamings like any other."""
        if not self.ready:
            return weight_conversions
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        from hqqtensor.integrations.transformers.load_ops import HqqLoad

        leaves = sorted({name.rpartition(".")[2] for name in self.ready})
        converters = [WeightConverter(rf"(?<![^.]){self._packed(leaf)}", leaf, [HqqLoad(self)]) for leaf in leaves]
        renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
        expected = model.state_dict()
        ready: dict[str, HQQTensor] = {}
        for name, tensor in self.ready.items():
            prefix, _, leaf = name.rpartition(".")
            key = f"{prefix}{'.' if prefix else ''}{self._packed(leaf)}"
            renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if renamed in expected:
                if tensor.shape != expected[renamed].shape:
                    want = list(expected[renamed].shape)
                    raise CheckpointError(f"{name}: the file has shape {list(tensor.shape)}, the model {want}")
                ready[renamed] = tensor
        self.ready = ready
        # Ours come first: at most one converter takes a key, and the patterns of a model's converters match too much.
        return [*converters, *weight_conversions]

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """PatchError where the disk is to hold weights and this version of transformers cannot be taught to."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            offload.require()

    def _packed(self, leaf: str) -> str:
        return self.packed_key or f"_{leaf}_qdata"

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is to be quantized while loading."""
        return param_name in self.plan

    def get_quantize_ops(self) -> Any:
        """The operation that transformers puts behind the weights that ``param_needs_quantization`` names."""
        from hqqtensor.integrations.transformers.load_ops import HqqQuantize

        return HqqQuantize(self)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes a weight, scales and zero points counted: ``device_map="auto"`` plans with it."""
        if param_name in self.plan:
            settings, shape = self.plan[param_name].settings, self.plan[param_name].matrix_shape()
            size = settings.group_size or shape[-1 if settings.axis == 1 else -2]
            return bits_per_weight(dataclasses.replace(settings, group_size=size)) / 8
        if param_name in self.ready:
            return self.ready[param_name].nbytes / self.ready[param_name].numel()
        return param.element_size()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, choice in self.plan.items():
            # Weights that the checkpoint lacks were just initialised and are to be trained: they are left dense.
            module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if not isinstance(getattr(module, leaf), HQQTensor) and not self.missing & set(choice.names):
                raise RuntimeError(f"{name} was loaded without being quantized")
        self.plan, self.ready = {}, {}
        for p in model.parameters():
            if isinstance(getattr(p, "_local_tensor", None), HQQTensor):  # a DTensor: transformers makes it trainable
                p.requires_grad_(False)
        for module in model.modules():
            show_quantized(module)
        # Saved under the names that the model has in memory: stored parts cannot go back through the converters.
        model._weight_conversions = []
        model.add_model_tags([QUANT_METHOD])
        model.hqq_quantized = True  # peft's prepare_model_for_kbit_training asks for this
        return model

    def adopt(self, model: Any) -> None:
        """What transformers does around loading, for a model that is loaded and quantized already."""
        if not any(isinstance(p, HQQTensor) for p in model.parameters()):
            raise ValueError("the model holds no quantized weight; call quantize_ first")
        model.is_quantized, model.quantization_method = True, QUANT_METHOD
        model.hf_quantizer = self
        self.postprocess_model(model)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The plain tensors and the metadata that ``save_pretrained`` writes: ``save_model``'s layout.

        Nothing where it writes adapters: these are dense, and transformers finds them in the model.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        units, header = split_state(offload.whole_state(model), {}, [])
        return {key: tensor for unit in units for key, tensor in unit.items()}, header

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if any(isinstance(p, HQQTensor) and p.device.type == "meta" for p in model.parameters()):
            raise ValueError("dequantize: parts of the model are offloaded; load it without offloading first")
        dequantize_(model)
        self.release(model)
        # save_pretrained leaves the dtype's name in the config.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)

    def release(self, model: Any) -> None:
        """Undo ``postprocess_model`` for a model whose weights are all dense again."""
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        model.hqq_quantized = False
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Yes, always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: gradients pass through quantized weights. Trainer refuses the quantized model alone."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the model with a static cache."""
        return True


def install() -> None:
    """Put the quantizer and its config into transformers' tables."""
    reason = "loading and saving quantized models"
    table = "AUTO_QUANTIZATION_CONFIG_MAPPING"
    patches.register("transformers.quantizers.auto", table, {QUANT_METHOD: HqqConfig}, reason, TRANSFORMERS)
    entry = {QUANT_METHOD: HQQTensorHfQuantizer}
    patches.register("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING", entry, reason, TRANSFORMERS)
    if is_hqq_available():
        module, reason = "transformers.quantizers.quantizer_hqq", "the warning that models of hqq are not loaded"
        patches.wrap(module, "HqqHfQuantizer.__init__", _warns_if_it_cannot_load, reason, TRANSFORMERS)
    else:
        serve_hqq()


def serve_hqq() -> None:
    """Take the place of transformers' own quantizer for ``quant_method`` "hqq"."""
    reason, entry = 'serving quant_method "hqq"', {"hqq": HQQTensorHfQuantizer}
    patches.register("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING", entry, reason, TRANSFORMERS)


def _warns_if_it_cannot_load(init: Callable) -> Callable:
    """``HqqHfQuantizer.__init__`` that says what follows: random weights, or an error that says not what to do."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        wanted = "get_weight_conversions" if self.pre_quantized else "get_quantize_ops"
        loads = any(
            getattr(type(self), name) is not getattr(HfQuantizer, name)
            for name in (wanted, "get_load_operations", "update_weight_conversions")
        )
        if loads:
            return
        outcome = "fills a checkpoint of hqq with random weights" if self.pre_quantized else "cannot quantize with hqq"
        warnings.warn(
            f"transformers {transformers.__version__} {outcome}. To let hqqtensor do it, call "
            "hqqtensor.integrations.transformers.register(hqq=True) first",
            stacklevel=2,
        )

    return __init__
