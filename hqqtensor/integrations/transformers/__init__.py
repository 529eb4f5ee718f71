"""transformers: a quantizer under ``quant_method`` "hqqtensor", which can serve "hqq" as well.

``import hqqtensor`` registers it as soon as transformers is imported, in either order; it does not import transformers.
"""

from typing import Any

from hqqtensor.config import HqqConfig
from hqqtensor.integrations import patches

QUANT_METHOD = "hqqtensor"


def register(hqq: bool = False) -> None:
    """Import transformers' quantizers and register with them; may be called any number of times.

    hqq: serve ``quant_method`` "hqq" too, in the place of transformers' own quantizer: configs of the class
    ``transformers.HqqConfig``, and checkpoints of the hqq library. Where the hqq package is not installed, this is so
    without asking, since transformers' own quantizer needs it. There is no way back in the same process.

    ``patches.PatchError`` if this version of transformers lacks what has to be changed.
    """
    from hqqtensor.integrations.transformers import config, quantizer

    config.install()
    quantizer.install()
    if hqq:
        quantizer.serve_hqq()
    patches.require("transformers.utils.quantization_config.", "transformers.quantizers.")


def adopt(model: Any, config: HqqConfig) -> None:
    """Make a transformers model that ``quantize_`` changed one that ``from_pretrained`` might have given.

    Then ``dequantize`` and ``Trainer`` know that it is quantized (``save_pretrained`` needs no ``adopt``). ``config``:
    what config.json is to say; the weights themselves rule. ValueError if the model holds no quantized weight.
    """
    from hqqtensor.integrations.transformers.quantizer import HQQTensorHfQuantizer

    register()
    HQQTensorHfQuantizer(config, pre_quantized=False).adopt(model)


def model_card(model: Any, base_model: str | None = None) -> str:
    """The text of a README.md for the hub: tags, how to load ``model``, what of it is quantized and how.

    ``base_model``: name on the hub of the model that was quantized. ValueError if nothing is quantized.
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
