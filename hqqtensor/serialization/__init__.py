"""Saving to and loading from safetensors files, with every number in them checked before it is used."""

from hqqtensor.serialization.inspect import CheckpointInfo, TensorInfo, inspect_checkpoint
from hqqtensor.serialization.load import load_model
from hqqtensor.serialization.save import save_model

__all__ = ["CheckpointInfo", "TensorInfo", "inspect_checkpoint", "load_model", "save_model"]
