"""``from_pretrained`` with a device map that puts quantized weights on the disk."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hqqtensor.integrations import patches
from hqqtensor.integrations.accelerate import INDEX_KEY, read_offloaded, write_offloaded
from hqqtensor.integrations.versions import TRANSFORMERS
from hqqtensor.tensor import HQQTensor


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


def install_writer() -> None:
    """transformers writes weights that it has changed while loading anew; quantized ones are written our way."""
    reason = "loading a model with quantized weights on the disk"
    patches.wrap("transformers.core_model_loading", "offload_and_maybe_resave_param", _writer, reason, TRANSFORMERS)


def install_dispatch() -> None:
    """Before accelerate attaches its hooks: quantized weights in the places of the dense ones, tied ones too."""
    reason = "loading a model with quantized weights on the disk"
    patches.wrap("transformers.modeling_utils", "accelerate_dispatch", _dispatcher, reason, TRANSFORMERS)


def require() -> None:
    """PatchError if this version of transformers or accelerate cannot be taught to offload quantized weights."""
    patches.require(
        "transformers.core_model_loading.", "transformers.modeling_utils.accelerate_dispatch", "accelerate."
    )


def _writer(resave: Callable) -> Callable:
    def offload_and_maybe_resave_param(
        target_name: str, param: Any, loading_info: Any, disk_offload_folder: Any, disk_offload_index: Any,
        *more: Any, **options: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(param, HQQTensor):
            args = (target_name, param, loading_info, disk_offload_folder, disk_offload_index)
            return resave(*args, *more, **options)
        require()
        loading_info.missing_keys.discard(target_name)
        disk_offload_index[target_name] = write_offloaded(param, target_name, disk_offload_folder)
        return disk_offload_index

    return offload_and_maybe_resave_param


def _dispatcher(dispatch: Callable) -> Callable:
    def accelerate_dispatch(
        model: Any, hf_quantizer: Any, device_map: Any, offload_folder: Any, offload_index: Any, *more: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            if offload_index and INDEX_KEY in offload_index.get(source, {}):
                offload_index[target] = offload_index[source]
        _place_on_meta(model, offload_index or {})
        return dispatch(model, hf_quantizer, device_map, offload_folder, offload_index, *more, **options)

    return accelerate_dispatch


def _place_on_meta(model: nn.Module, index: dict[str, Any]) -> None:
    """Put a quantized parameter on the meta device in the place of each that ``index`` says is on the disk."""
    by_file: dict[str, nn.Parameter] = {}
    for name, info in index.items():
        if INDEX_KEY in info:
            stored = info[INDEX_KEY]
            if stored["file"] not in by_file:
                by_file[stored["file"]] = nn.Parameter(read_offloaded(stored).to("meta"), requires_grad=False)
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = by_file[stored["file"]]
