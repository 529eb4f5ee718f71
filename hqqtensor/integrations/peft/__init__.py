"""PEFT: LoRA and DoRA over quantized weights, with merging, and adapters that begin by undoing quantization error.

``import hqqtensor`` registers this as soon as peft is imported, in either order; it does not import peft.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    model: nn.Module,
    dense: nn.Module | str | Path,
    adapter_name: str = "default",
    batches: Iterable[Any] | None = None,
    rounds: int = 0,
) -> dict[str, float]:
    """Set LoRA's matrices to the best approximation of ``dense weight - quantized weight`` that their rank allows.

    model: with LoRA over quantized weights (``get_peft_model``), before training and before an optimizer is made.
    dense: the same model before it was quantized, or its directory with safetensors files, of which a weight at a time
    is read. DoRA gets new magnitudes. The result does not depend on the random state.
    batches: what the model is called with, as for ``calibrate``: a few thousand tokens of typical text. The error is
    then that of each linear layer's outputs on them; experts and embeddings stay with that of their weights. Up to
    1 GiB of second moments is in memory at a time.
    rounds: 0 leaves quantized weights as they are, so the adapters serve everyone who has the same quantized model.
    Else ``dense weight - update`` is quantized again that many times and the update fitted anew, with error feedback
    where there are batches. The weights keep their settings and size, but the adapters need these weights: save the
    quantized model too. Tied weights stay.

    Returns for each adapted weight, by its name in the dense model, the share of the squared error that is left.
    ValueError where no quantized weight has the adapter, one is merged, ``dense`` has no such dense weight of the same
    shape, rounds are negative or batches empty; NotImplementedError for convolutions; ImportError without peft. After
    an error the model is as before.
    """
    from hqqtensor.integrations.peft import correction

    return correction.initialize(model, dense, adapter_name, batches, rounds)
