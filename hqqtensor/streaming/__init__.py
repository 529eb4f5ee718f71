"""Quantizes a model directory to another one without holding the model: tensor by tensor, by one process or several.

The model's class on the meta device gives names, ties and kinds of layers (``targets``). From these the whole output is
planned before anything is read (``plan``). Each tensor is then read, quantized and written to its place (``work``), in
a folder that becomes the output at the end (``folder``). A calibration comes before that, one block in memory at a
time (``calibrated``). What is written equals what ``quantize_`` and ``save_model``
give for the model opened whole, bit for bit.
"""

from hqqtensor.streaming.calibrated import CalibrationRequest, memory_to_use, offloaded
from hqqtensor.streaming.folder import folder_of, settle
from hqqtensor.streaming.gguf_source import GgufSource
from hqqtensor.streaming.plan import Plan, make_plan
from hqqtensor.streaming.run import is_written, quantize_files
from hqqtensor.streaming.source import NotStreamable, Source

__all__ = [
    "CalibrationRequest",
    "GgufSource",
    "NotStreamable",
    "Plan",
    "Source",
    "folder_of",
    "is_written",
    "make_plan",
    "memory_to_use",
    "offloaded",
    "quantize_files",
    "settle",
]
