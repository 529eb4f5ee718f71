"""PEFT: LoRA and DoRA over quantized weights, with merging.

``import hqqtensor`` registers this as soon as peft is imported, in either order; it does not import peft.
"""

from hqqtensor.integrations import patches


def register() -> None:
    """Import peft and register with it; may be called any number of times.

    ``patches.PatchError`` if this version of peft lacks what has to be changed.
    """
    from hqqtensor.integrations.peft import dequantize, lora

    dequantize.install()
    lora.install()
    patches.require("peft.")
