"""Buffers that are in no checkpoint, for models of transformers that were built on the meta device."""

import copy
import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from hqqtensor.empty_parameters import empty_parameters


def computed_buffers(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The buffers of these names as the model's constructor computes them, on the cpu; none for other models.

    The model is built once more for that, with its parameters on the meta device, where they take no memory. If that
    fails, a warning says why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        with empty_parameters():
            again = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        warnings.warn(f"{type(model).__name__} could not be built to compute its buffers: {error}", stacklevel=2)
        return {}
    return {name: again.get_buffer(name).to(model.get_buffer(name).dtype) for name in names}
