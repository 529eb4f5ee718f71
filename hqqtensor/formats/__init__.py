"""Number formats: what a code stands for before scale and zero point. One registry entry adds one."""

from hqqtensor.formats.base import Format, format_names, get_format, register_format
from hqqtensor.formats.integer import INTEGER

__all__ = ["INTEGER", "Format", "format_names", "get_format", "register_format"]
