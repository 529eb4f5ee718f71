"""``from_pretrained`` with a device map that puts quantized weights on the disk."""

import functools
from typing import Any

from torch import Tensor, nn

from hqqtensor.import_hook import when_imported
from hqqtensor.integrations.accelerate import read_offloaded, write_offloaded
from hqqtensor.tensor import HQQTensor


def register_when_imported() -> None:
    """Register as soon as transformers' loading code is imported."""
    when_imported("transformers.core_model_loading", _install_writer)
    when_imported("transformers.modeling_utils", _install_dispatch)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model of which parts may be offloaded; those are read (memory-mapped), a tied one once."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    read: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            if id(tensor) not in read:
                read[id(tensor)] = load_offloaded_parameter(model, name)
            state[name] = read[id(tensor)]
    return state


def _install_writer() -> None:
    """transformers writes weights that it has changed while loading anew; quantized ones are written our way."""
    from transformers import core_model_loading

    original = core_model_loading.offload_and_maybe_resave_param
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def offload_and_maybe_resave_param(
        target_name: str, param: Any, loading_info: Any, disk_offload_folder: Any, disk_offload_index: Any,
        applied_ops: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(param, HQQTensor):
            args = (target_name, param, loading_info, disk_offload_folder, disk_offload_index, applied_ops)
            return original(*args)
        loading_info.missing_keys.discard(target_name)
        disk_offload_index[target_name] = write_offloaded(param, target_name, disk_offload_folder)
        return disk_offload_index

    core_model_loading.offload_and_maybe_resave_param = offload_and_maybe_resave_param


def _install_dispatch() -> None:
    """Before accelerate attaches its hooks: quantized weights in the places of the dense ones, tied ones too."""
    from transformers import modeling_utils

    original = modeling_utils.accelerate_dispatch
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def accelerate_dispatch(
        model: Any, hf_quantizer: Any, device_map: Any, offload_folder: Any, offload_index: Any, offload_buffers: Any
    ) -> None:
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            if offload_index and "hqqtensor" in offload_index.get(source, {}):
                offload_index[target] = offload_index[source]
        _place_on_meta(model, offload_index or {})
        original(model, hf_quantizer, device_map, offload_folder, offload_index, offload_buffers)

    modeling_utils.accelerate_dispatch = accelerate_dispatch


def _place_on_meta(model: nn.Module, index: dict[str, Any]) -> None:
    made: dict[str, nn.Parameter] = {}
    for name, info in index.items():
        if "hqqtensor" in info:
            source = info["hqqtensor"]["file"]
            if source not in made:
                made[source] = nn.Parameter(read_offloaded(info["hqqtensor"]).to("meta"), requires_grad=False)
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = made[source]
