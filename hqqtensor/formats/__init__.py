"""Number formats: what a code stands for before scale and zero point. One registry entry adds one."""

from hqqtensor.formats.base import Format, format_names, get_format, observe_formats, register_format
from hqqtensor.formats.integer import INTEGER
from hqqtensor.formats.learned import CODEBOOK
from hqqtensor.formats.levels import Levels
from hqqtensor.formats.minifloat import FP4, FP6, FP8
from hqqtensor.formats.nf4 import NF4
from hqqtensor.formats.table import TableFormat

__all__ = [
    "CODEBOOK", "FP4", "FP6", "FP8", "INTEGER", "NF4", "Format", "Levels", "TableFormat", "format_names", "get_format",
    "observe_formats", "register_format",
]  # fmt: skip
