"""What makes hqqtensor at home in other libraries. Nothing here imports one of them before the user does.

Every change of another library goes through ``hqqtensor.integrations.patches``.
"""

import functools
import importlib
import sys
from collections.abc import Callable

from hqqtensor.import_hook import is_half_imported, when_imported
from hqqtensor.integrations import patches, versions

_SET_UPS = (
    ("torch.onnx", "onnx", "install"),
    ("torchao.core.config", "torchao", "install_configs"),
    ("torchao.prototype.safetensors.safetensors_utils", "torchao", "install_classes"),
    ("torchao.prototype.safetensors.safetensors_support", "torchao", "install_flatten"),
    ("accelerate.utils.offload", "accelerate", "install"),
    ("peft.utils.integrations", "peft.dequantize", "install"),
    ("peft.tuners.lora.model", "peft.lora", "install"),
    ("transformers.utils.quantization_config", "transformers.config", "install"),
    ("transformers.quantizers.auto", "transformers.quantizer", "install"),
    ("transformers.core_model_loading", "transformers.offload", "install_writer"),
    ("transformers.modeling_utils", "transformers.offload", "install_dispatch"),
    ("transformers.modeling_utils", "transformers.model", "install"),
    ("transformers.modeling_utils", "transformers.attention", "install"),
    ("transformers.integrations.moe", "transformers.experts", "install"),
)
"""A module of another library, and the module here and the function of it that run when that has been imported."""


@functools.cache
def register_when_imported() -> None:
    """Register with each library as soon as the user imports it; the second call does nothing."""
    for module, ours, function in _SET_UPS:
        set_up = functools.partial(_set_up, module, ours, function)
        when_imported(module, set_up)
        # Where the user imports our module first, it is what imports the other one, and is not ready at that time.
        when_imported(f"{__name__}.{ours}", functools.partial(_if_imported, module, set_up))


def changed_modules() -> list[str]:
    """The modules of other libraries after whose import something is changed in them."""
    return sorted({module for module, _, _ in _SET_UPS})


def _if_imported(module: str, set_up: Callable[[], None]) -> None:
    if module in sys.modules and not is_half_imported(module):
        set_up()


def _set_up(module: str, ours: str, function: str) -> None:
    """Run a function of ``_SET_UPS``. Its error becomes a warning: the user's import of ``module`` is not to fail."""
    name = f"{__name__}.{ours}"
    try:
        our_module = importlib.import_module(name)
        if hasattr(our_module, function) or not is_half_imported(name):
            getattr(our_module, function)()
    except Exception as error:
        tested_with = getattr(versions, module.partition(".")[0].upper())
        patches.failed(module, error, f"what hqqtensor.integrations.{ours} does", tested_with)
