"""``generate()`` of transformers at the speed of the kernels: decoder layers as one operator, nothing to compile."""

from typing import Any

from torch import nn

from hqqtensor.generation.cache import growing_cache as growing_cache
from hqqtensor.generation.families import FAMILIES
from hqqtensor.generation.forward import DecoderForward
from hqqtensor.generation.memory import gather_weights
from hqqtensor.ops.backend import decoder_maker


def prepare_for_generation_(model: Any, copy_weights: bool = True) -> Any:
    """Make plain ``model.generate(...)``, pipelines and streamers of a quantized model on a CPU fast; gives ``model``.

    The modules stay what they are. One to a few new tokens go through all decoder layers in one operator, prompts
    through transformers' own code. A model that is changed later (weights, adapters, hooks, dtype, training) still
    gives right results: by a decoder made anew, or by transformers' own code. Packed weights are copied to where the
    kernels read them fastest; with ``copy_weights=False`` they stay where they are, such as in a mapped file whose
    memory several processes share.

    ValueError, and the model is as it was, where it cannot be served; it says which module is the reason. To call it
    again on a prepared model does nothing. ``undo_generation_`` takes it back.
    """
    base = _base(model)
    if isinstance(base.__dict__.get("forward"), DecoderForward):
        return model
    if "forward" in base.__dict__:
        raise ValueError(f"{type(base).__name__} has another forward of its own already (accelerate's hooks, for one)")
    forward = DecoderForward(base)
    why_not = forward.why_it_cannot()
    if why_not is not None:
        raise ValueError(f"{type(base).__name__} is generated with as before: {why_not}")
    if copy_weights:
        make = decoder_maker("cpu")
        assert make is not None
        gather_weights(model, make)
    base.forward = forward
    return model


def undo_generation_(model: Any) -> Any:
    """Take ``prepare_for_generation_`` back; gives ``model``. A model that is not prepared stays as it is."""
    base = _base(model)
    if isinstance(base.__dict__.get("forward"), DecoderForward):
        del base.forward
    return model


def _base(model: Any) -> Any:
    """The module that holds the decoder layers; ValueError where there is none of a known family."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [m for m in modules if type(m).__name__ in FAMILIES and hasattr(m, "rotary_emb")]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found) or 'no'} base models of {sorted(FAMILIES)}; one is needed"
        )
    return found[0]
