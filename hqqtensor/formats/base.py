"""The interface of a number format and the registry of formats."""

from typing import Protocol

from torch import Tensor


class Format(Protocol):
    """Turns scaled weights into codes and back, in float32.

    ``encode(w, inverse_scale, zero_point, nbits)`` gives the nearest codes (uint8, shape of ``w``);
    ``decode(codes, scale, zero_point, nbits)`` gives float32 weights. Scale and zero point
    broadcast against ``w``.
    """

    name: str
    widths: tuple[int, ...]
    has_zero_point: bool

    def encode(self, w: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor: ...

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor: ...


_FORMATS: dict[str, Format] = {}


def register_format(fmt: Format) -> None:
    """Add ``fmt`` under its name; a name that is taken raises ValueError."""
    if fmt.name in _FORMATS:
        raise ValueError(f"format {fmt.name!r} is already registered")
    _FORMATS[fmt.name] = fmt


def get_format(name: str) -> Format:
    """The format called ``name``; ValueError names those on offer."""
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {format_names()}, got {name!r}")
    return _FORMATS[name]


def format_names() -> list[str]:
    """Names of the registered formats."""
    return sorted(_FORMATS)
