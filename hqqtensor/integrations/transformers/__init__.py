"""transformers: a quantizer of its own under ``quant_method`` "hqqtensor", which also serves "hqq".

``import hqqtensor`` registers both as soon as transformers' quantizers are imported, before or after; it does not
import transformers. ``register()`` does it at once.
"""

from typing import Any

from hqqtensor.config import HqqConfig
from hqqtensor.import_hook import when_imported
from hqqtensor.integrations.transformers import offload

QUANT_METHOD = "hqqtensor"


def register() -> None:
    """Import transformers' quantizers and register with them; may be called any number of times."""
    import transformers.quantizers.auto
    import transformers.utils.quantization_config  # noqa: F401  both hooks have run, or run now

    _install_config()
    _install_quantizer()


def adopt(model: Any, config: HqqConfig) -> None:
    """Make a transformers model that ``quantize_`` changed one that ``from_pretrained`` might have given.

    Then ``save_pretrained``, ``dequantize`` and ``Trainer`` know that it is quantized. ``config``: what config.json
    is to say; the weights themselves rule. ValueError where the model holds no quantized weight.
    """
    from hqqtensor.integrations.transformers.quantizer import HQQTensorHfQuantizer

    register()
    HQQTensorHfQuantizer(config, pre_quantized=False).adopt(model)


def model_card(model: Any, base_model: str | None = None) -> str:
    """The text of a README.md for the hub: tags, how to load ``model``, what of it is quantized and how.

    ``base_model``: name on the hub of the model that was quantized. ValueError where nothing is quantized.
    """
    from hqqtensor.diagnostics import check_quantization_status

    status = check_quantization_status(model)
    if not status.quantized:
        raise ValueError("the model holds no quantized weight; call quantize_ first")
    front = ["library_name: transformers", f"tags:\n- {QUANT_METHOD}\n- hqq"]
    title = "Quantized model"
    if base_model is not None:
        front += [f"base_model: {base_model}", "base_model_relation: quantized"]
        title = f"{base_model}, quantized"
    kind = type(model).__name__
    lines = ["---", *front, "---", f"# {title}", "", "```text", str(status), "```", "", "Load it with:", ""]
    code = f'import hqqtensor\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("NAME")'
    return "\n".join([*lines, "```python", code, "```", "", "`pip install hqqtensor` first.", ""])


def register_when_imported() -> None:
    """Register as soon as the user imports transformers; costs nothing where it is never imported."""
    when_imported("transformers.utils.quantization_config", _install_config)
    when_imported("transformers.quantizers.auto", _install_quantizer)
    offload.register_when_imported()


def _install_config() -> None:
    import hqqtensor.integrations.transformers.config  # noqa: F401  installs itself as it is imported


def _install_quantizer() -> None:
    import hqqtensor.integrations.transformers.quantizer  # noqa: F401  as above
