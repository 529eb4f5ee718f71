"""One layer of an hqq-library checkpoint, read into an HQQTensor without a change of any value.

hqq keeps the codes as a grouped matrix, ``reshape(-1, group_size)`` for axis 1 and ``reshape(group_size, -1)`` for
axis 0, packed along its rows in slabs, the first slab in the highest bits (hqq.core.bitpack). Scales are stored
inverted already: value = (code - zero) * scale.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hqqtensor.config import SCALE_DTYPES
from hqqtensor.ops.checks import LARGEST
from hqqtensor.packing import pack
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.validate import MAX_NUMEL

LAYER_KEYS = frozenset(
    (
        "W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float",
        "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
        "channel_wise", "optimize", "round_zero",
    )
)  # fmt: skip
"""Keys of a layer in hqq's flat layout, less its bias."""

PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Names of hqq's packings: bits a code, codes a word."""

WIDTHS = {
    8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8", 1: "1bit_u8",
}  # fmt: skip
"""Packing of each width that hqq offers; 1.58 means three levels."""

_DTYPES = {str(dtype): dtype for dtype in SCALE_DTYPES}


def read_layer(name: str, entries: Mapping[str, Any]) -> HQQTensor:
    """The weight of the layer ``name``, from encoded or raw entries, new (flat) or old (``meta``).

    CheckpointError naming the layer for anything that does not fit; geometry is taken from ``shape``,
    ``group_size`` and ``axis``, and each tensor is held against it.
    """
    try:
        return _Layer(name, entries).tensor()
    except _Bad as error:
        raise CheckpointError(f"{name}: {error}") from None


class _Bad(Exception):
    pass


class _Layer:
    def __init__(self, name: str, entries: Mapping[str, Any]) -> None:
        meta = entries.get("meta", {})
        if not isinstance(meta, Mapping):
            raise _Bad("its meta is no dict")
        self.entries: dict[str, Any] = {**entries, **meta}
        self.nbits = self._number("nbits", tuple(WIDTHS))
        self.axis = int(self._number("axis", (0, 1)))
        self.packing = _text(self._get("packing"))
        if self.packing != WIDTHS[self.nbits]:
            raise _Bad(f"packing {self.packing!r} does not go with {self.nbits} bits, {WIDTHS[self.nbits]!r} does")
        shape = _ints(self._get("shape"))
        if len(shape) != 2 or not all(0 < s <= LARGEST for s in shape) or shape[0] * shape[1] >= MAX_NUMEL:
            raise _Bad(f"bad shape {shape}")
        self.rows, self.columns = shape
        self.numel = self.rows * self.columns
        size = self.entries.get("group_size")
        self.size = (self.columns if self.axis else self.rows) if size is None else _int(size, "group_size")
        if self.size < 1 or self.numel % self.size:
            raise _Bad(f"group_size {self.size} does not divide the {self.numel} weights")
        self.groups = self.numel // self.size
        self.dtype = _DTYPES.get(_text(self.entries.get("compute_dtype", torch.float16)))
        if self.dtype is None:
            raise _Bad(f"compute_dtype must be one of {sorted(_DTYPES)}")

    def tensor(self) -> HQQTensor:
        scale, zero = self._scales()
        codes = _unpack(self._tensor("W_q"), self.packing, self._grouped(), _flag(self.entries.get("view_as_float")))
        top = 2 if self.nbits == 1.58 else 2 ** int(self.nbits) - 1
        if int(codes.max()) > top:
            raise _Bad(f"holds codes over {top}, the largest of {self.nbits} bits")
        nbits = math.ceil(self.nbits)
        codes = codes.reshape(self.rows, self.columns)
        scale, zero, size = self._regroup(scale, zero)
        shape = torch.Size((self.rows, self.columns))
        assert self.dtype is not None
        return HQQTensor(pack(codes, nbits), scale, nbits, size, self.axis, shape, self.dtype, zero_point=zero)

    def _grouped(self) -> tuple[int, int]:
        return (self.groups, self.size) if self.axis else (self.size, self.groups)

    def _regroup(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, int]:
        """Scales by row and group. hqq's groups may run over the ends of rows; then finer groups share a scale."""
        if self.axis:
            size = math.gcd(self.columns, self.size)
            index = torch.arange(0, self.numel, size).div(self.size, rounding_mode="floor")
            index = index.view(self.rows, self.columns // size)
        else:
            rows = self.groups // math.gcd(self.groups, self.columns)
            size = self.rows // rows
            index = torch.arange(rows * self.columns).remainder(self.groups).view(rows, self.columns)
        return scale[index], zero[index], size

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a group; quantized ones as hqq reads them, in its compute dtype."""
        values: dict[str, Tensor] = {}
        stacked = self.entries.get("zero_scale")
        for place, part in enumerate(("zero", "scale")):
            plain = not _flag(self.entries.get(f"quant_{part}"))
            key = part if plain else f"{part}_q"
            if stacked is not None:
                if not isinstance(stacked, Tensor) or stacked.ndim < 1 or stacked.shape[0] != 2:
                    raise _Bad("zero_scale must be two tensors in one")
                self.entries[key] = stacked[place]
            stored = self._tensor(key)
            values[part] = stored if plain else self._read_quantized(part, stored)
            if values[part].dtype not in SCALE_DTYPES or values[part].numel() not in (1, self.groups):
                shown = f"{list(values[part].shape)} {values[part].dtype}"
                raise _Bad(f"{part} should be {self.groups} numbers of {list(_DTYPES)}, got {shown}")
            if not bool(values[part].isfinite().all()):
                raise _Bad(f"{part} holds NaN or Inf")
            values[part] = values[part].reshape(-1).expand(self.groups)
        if values["zero"].dtype != values["scale"].dtype:
            values = {part: t.to(torch.float32) for part, t in values.items()}
        return values["scale"], values["zero"]

    def _read_quantized(self, part: str, packed: Tensor) -> Tensor:
        meta = self.entries.get(f"meta_{part}")
        if not isinstance(meta, Mapping):
            raise _Bad(f"{part} is quantized, but there is no meta_{part}")
        size, axis, packing = meta.get("group_size"), meta.get("axis"), meta.get("packing")
        if axis not in (0, 1) or packing not in PACKINGS:
            raise _Bad(f"meta_{part} has axis {axis!r} and packing {packing!r}")
        shape = list(packed.shape) if size is None else [self.groups // _int(size, "group_size"), int(size)]
        if shape[0] * shape[-1] != self.groups or len(shape) != 2:
            raise _Bad(f"{part} in groups of {size} does not fit {self.groups} groups")
        rows, columns = shape if axis or size is None else shape[::-1]
        codes = _unpack(packed, packing, (rows, columns), False)
        parts = [meta.get(key) for key in ("zero", "scale")]
        want = (1, rows if axis else columns)
        if not all(isinstance(t, Tensor) and t.is_floating_point() and t.numel() in want for t in parts):
            raise _Bad(f"the scale and zero of meta_{part} must be {want[1]} numbers")
        zero, scale = (t.reshape(1 if t.numel() == 1 else -1, 1) if axis else t.reshape(1, -1) for t in parts)  # type: ignore[union-attr]
        assert self.dtype is not None
        return (codes.to(self.dtype) - zero.to(self.dtype)) * scale.to(self.dtype)

    def _get(self, key: str) -> Any:
        if self.entries.get(key) is None:
            raise _Bad(f"lacks {key}")
        return self.entries[key]

    def _tensor(self, key: str) -> Tensor:
        value = self._get(key)
        if not isinstance(value, Tensor):
            raise _Bad(f"{key} is no tensor")
        return value.detach()

    def _number(self, key: str, allowed: tuple[float, ...]) -> float:
        value = self._get(key)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        value = round(value, 2) if isinstance(value, float) else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in allowed:
            raise _Bad(f"{key} must be one of {list(allowed)}, got {value!r}")
        return value


def _unpack(packed: Tensor, packing: str, shape: tuple[int, int], as_float: bool) -> Tensor:
    """hqq's packed words to codes, uint8 ``shape``."""
    bits, per_word = PACKINGS[packing]
    word = torch.int32 if packing == "3bit_32" else torch.uint8
    if as_float:
        if not packed.is_floating_point() or packed.ndim != 2:
            raise _Bad(f"W_q viewed as floats should be floating and of rank 2, got {packed.dtype}")
        try:
            packed = packed.contiguous().view(word)
        except RuntimeError:
            raise _Bad(f"W_q of {list(packed.shape)} {packed.dtype} cannot be viewed as {word}") from None
    rows, columns = shape
    want = [-(-rows // per_word), columns]
    if packed.dtype != word or list(packed.shape) != want or (rows % per_word and word == torch.uint8):
        raise _Bad(f"packed codes should be {want} of {word}, got {list(packed.shape)} {packed.dtype}")
    mask = 2**bits - 1
    slabs = [((packed >> (bits * (per_word - 1 - i))) & mask).to(torch.uint8) for i in range(per_word)]
    return torch.cat(slabs)[:rows] if per_word > 1 else packed


def _int(value: Any, key: str) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Bad(f"{key} must be a whole number, got {value!r}")
    return value


def _ints(value: Any) -> list[int]:
    if isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point():
        value = value.tolist() if value.numel() < 9 else []
    if not isinstance(value, (list, tuple)):
        raise _Bad(f"shape must be a list of numbers, got {type(value).__name__}")
    return [_int(v, "shape") for v in value]


def _flag(value: Any) -> bool:
    return bool(value.item()) if isinstance(value, Tensor) and value.numel() == 1 else value is True


def _text(value: Any) -> str:
    """A string, a dtype's name, or a string as its character codes."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1 and value.numel() < 64:
        return bytes(value.tolist()).decode("latin-1")
    return str(value) if isinstance(value, (str, torch.dtype)) else ""
