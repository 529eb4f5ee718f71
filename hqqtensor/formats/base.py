"""The interface of a number format and the registry of formats."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hqqtensor.formats.levels import Levels


class Format(Protocol):
    """Turns scaled weights into codes and back, in float32.

    name: as in ``HqqConfig.format``. widths: the bits a code may have.
    ``encode(w, inverse_scale, zero_point, nbits)``: the nearest codes, uint8 of the shape of ``w``.
    ``decode(codes, scale, zero_point, nbits)``: float32 weights of the shape of ``codes``. Scale and zero point
    broadcast against the weights. A format without a zero point takes None there; a ``learned`` one takes the entries
    of its codebook, ``[..., N or 1, 2**nbits]`` ascending, for weights ``[..., N, K]``.
    ``levels(nbits)``: the values that codes stand for at scale 1; None where they are integers less a zero point, or
    learned. ``ends(nbits)``: the codes of the lowest and the highest value.
    """

    name: str
    widths: tuple[int, ...]
    has_zero_point: bool
    learned: bool

    def encode(self, w: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor: ...

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int) -> Tensor: ...

    def levels(self, nbits: int) -> Levels | None: ...

    def ends(self, nbits: int) -> tuple[int, int]: ...


_FORMATS: dict[str, Format] = {}
_observers: list[Callable[[Format], None]] = []


def register_format(fmt: Format) -> None:
    """Add ``fmt`` under its name; a name that is taken raises ValueError."""
    if fmt.name in _FORMATS:
        raise ValueError(f"format {fmt.name!r} is already registered")
    for observer in _observers:  # one that refuses the format raises before it is added
        observer(fmt)
    _FORMATS[fmt.name] = fmt


def observe_formats(observer: Callable[[Format], None]) -> None:
    """Call ``observer(format)`` for every format, those registered so far and those to come: compiled kernels keep
    tables of their own."""
    for fmt in _FORMATS.values():
        observer(fmt)
    _observers.append(observer)


def get_format(name: str) -> Format:
    """The format called ``name``; ValueError names those on offer."""
    if not isinstance(name, str) or name not in _FORMATS:
        raise ValueError(f"format must be one of {format_names()}, got {name!r}")
    return _FORMATS[name]


def format_names() -> list[str]:
    """Names of the registered formats."""
    return sorted(_FORMATS)
