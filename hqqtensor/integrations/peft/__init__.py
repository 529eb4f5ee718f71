"""PEFT: LoRA and DoRA over quantized weights, with merging, and adapters that begin by undoing quantization error.

``import hqqtensor`` registers this as soon as peft is imported, in either order; it does not import peft.
"""

from pathlib import Path

from torch import nn

from hqqtensor.integrations import patches


def register() -> None:
    """Import peft and register with it; may be called any number of times.

    ``patches.PatchError`` if this version of peft lacks what has to be changed.
    """
    from hqqtensor.integrations.peft import dequantize, lora

    dequantize.install()
    lora.install()
    patches.require("peft.")


def initialize_lora_from_error(
    model: nn.Module, dense: nn.Module | str | Path, adapter_name: str = "default"
) -> dict[str, float]:
    """Set LoRA's matrices to the best approximation of ``dense weight - quantized weight`` that their rank allows.

    model: with LoRA over quantized weights (``get_peft_model``), before training and before an optimizer is made.
    dense: the same model before it was quantized, or its directory with safetensors files, of which a weight at a time
    is read. Quantized weights stay as they are, so the adapters serve everyone who has the same quantized model. DoRA
    gets new magnitudes. The result does not depend on the random state.

    Returns for each adapted weight, by its name in the dense model, the share of the squared error that is left.
    ValueError where no quantized weight has the adapter, one is merged, or ``dense`` has no such dense weight of the
    same shape; NotImplementedError for convolutions; ImportError without peft. After an error the model is as before.
    """
    from hqqtensor.integrations.peft import correction

    return correction.initialize(model, dense, adapter_name)
