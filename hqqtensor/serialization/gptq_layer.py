"""One layer of a GPTQ or AWQ checkpoint, read into an HQQTensor without a change of any value.

Both keep integer codes and zero points in int32 words and float scales, value = (code - zero) * scale:

    GPTQ (AutoGPTQ, GPTQModel)             AWQ ("gemm")
    qweight  [K * bits / 32, N]            [K, N / 8]            codes packed along in_features / out_features
    qzeros   [groups, N * bits / 32]       [groups, N / 8]       packed along out_features
    scales   [groups, N]                   [groups, N]
    g_idx    [K], the group of each input  none: groups in order

GPTQ's words are one stream of bits, the first code in the lowest. AWQ (4 bits) puts the columns 0 2 4 6 1 3 5 7 of
each eight into the nibbles of a word, lowest first. Version 1 of GPTQ's format stores zero - 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtensor.config import SCALE_DTYPES
from hqqtensor.ops.checks import LARGEST
from hqqtensor.packing import pack
from hqqtensor.serialization.layout import CheckpointError, InputError
from hqqtensor.tensor import HQQTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of each eight, that lies in nibble 0, 1, ... of a word."""


@dataclass(frozen=True)
class PackedSettings:
    """What ``quantization_config`` says of all layers. ``version``: "gptq", "gptq_v2" or "awq"; group_size None: K."""

    version: str
    nbits: int
    group_size: int | None


def read_packed(
    name: str, entries: Mapping[str, Tensor], settings: PackedSettings, unordered: str = "error"
) -> HQQTensor | Tensor:
    """The weight ``[N, K]`` of the layer ``name`` from its ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    unordered: what becomes of a layer whose groups lie in an order that groups of neighbours cannot express:
    "error", or "dense", its exact values in the scales' dtype. CheckpointError naming the layer for anything that
    does not fit; shapes are held against one another and the settings before a code is read.
    """
    nbits, awq = settings.nbits, settings.version == "awq"
    part = _checked_parts(name, entries, settings)
    rows, columns, size, index = part.scale.shape[1], part.columns, part.group_size, part.index
    zero = _zero_points(part.zeros, settings)[:, :rows].t().to(part.scale.dtype)  # [N, groups]
    scale = part.scale.t().contiguous()
    words = part.words
    codes = _unpack_columns(words, settings).t()[:rows] if awq else unpack_words(words.t(), nbits)[:, :columns]
    if index is not None:
        step = _neighbours(index, size)
        if step != size and nbits + 32 / step > 16:
            if unordered == "dense":
                return (codes - zero[:, index]) * scale[:, index]
            raise InputError(
                f"{name}: its inputs are grouped in an order of their own (desc_act) that groups of neighbouring "
                "inputs cannot express; hqqtensor convert --act-order dense keeps such layers as dense weights"
            )
        if step != size or bool((index != torch.arange(columns) // size).any()):
            size, first = step, index[::step]
            scale, zero = scale[:, first].contiguous(), zero[:, first]
    zero = zero.contiguous()
    shape = torch.Size((rows, columns))
    return HQQTensor(pack(codes.contiguous(), nbits), scale, nbits, size, 1, shape, scale.dtype, zero_point=zero)


@dataclass(frozen=True)
class _Parts:
    """The stored tensors of a layer, which fit one another and the settings."""

    words: Tensor
    zeros: Tensor
    scale: Tensor  # [groups, N], finite
    index: Tensor | None  # [K], each below the number of groups
    columns: int  # K
    group_size: int


def _checked_parts(name: str, entries: Mapping[str, Tensor], settings: PackedSettings) -> _Parts:
    """Take the tensors of the layer ``name`` from ``entries``; CheckpointError where one does not fit."""

    def take(key: str, dtypes: tuple[torch.dtype, ...], rank: int) -> Tensor:
        t = entries.get(key)
        if t is None:
            raise CheckpointError(f"{name}: lacks {key}")
        if t.dtype not in dtypes or t.ndim != rank or t.numel() == 0 or max(t.shape) > LARGEST:
            shown = [str(d).removeprefix("torch.") for d in dtypes]
            raise CheckpointError(f"{name}: {key} should be of rank {rank} and {shown}, got {list(t.shape)} {t.dtype}")
        return t.detach()

    words, zeros = (take(key, (torch.int32,), 2) for key in ("qweight", "qzeros"))
    scale = take("scales", SCALE_DTYPES, 2)
    nbits, awq = settings.nbits, settings.version == "awq"
    groups, rows = scale.shape
    index = None if awq or "g_idx" not in entries else take("g_idx", (torch.int32, torch.int64), 1).long()
    columns = words.shape[0] if awq else words.shape[0] * 32 // nbits
    if index is not None and _words(index.shape[0], nbits) == words.shape[0]:
        columns = index.shape[0]  # the last words may be filled up
    size = min(settings.group_size or columns, columns)
    want = {
        "qweight": (columns, _words(rows, nbits)) if awq else (_words(columns, nbits), rows),
        "scales": (-(-columns // size), rows),
        "qzeros": (groups, _words(rows, nbits)),
    }
    for key, t in (("qweight", words), ("scales", scale), ("qzeros", zeros)):
        if tuple(t.shape) != want[key]:
            raise CheckpointError(
                f"{name}: {nbits} bits in groups of {size} over [{rows}, {columns}] do not fit {key} {list(t.shape)}"
            )
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"{name}: scales hold NaN or Inf")
    if index is not None and (index.shape[0] != columns or int(index.min()) < 0 or int(index.max()) >= groups):
        raise CheckpointError(f"{name}: g_idx should be {columns} numbers of groups below {groups}")
    return _Parts(words, zeros, scale, index, columns, size)


def _words(codes: int, nbits: int) -> int:
    """Words that hold so many codes: whole runs of words, the last filled up."""
    span = math.lcm(nbits, 32)
    return -(-codes * nbits // span) * (span // 32)


def unpack_words(words: Tensor, nbits: int) -> Tensor:
    """The codes, uint8 ``[R, W * 32 / nbits]``, of int32 words ``[R, W]`` that hold one stream of bits a row."""
    span = math.lcm(nbits, 8)
    chunks = words.contiguous().view(torch.uint8).unflatten(1, (-1, span // 8))  # little-endian: the same stream
    codes = []
    for start in range(0, span, nbits):
        byte, shift = divmod(start, 8)
        code = chunks[..., byte] >> shift
        if shift + nbits > 8:
            code = code | chunks[..., byte + 1] << (8 - shift)
        codes.append(code & (2**nbits - 1))
    return torch.stack(codes, -1).flatten(1)


def _unpack_columns(words: Tensor, settings: PackedSettings) -> Tensor:
    """What is packed along out_features: AWQ's codes, everyone's zero points."""
    codes = unpack_words(words, settings.nbits)
    if settings.version != "awq":
        return codes
    places = [AWQ_ORDER.index(column) for column in range(8)]
    return codes.unflatten(1, (-1, 8))[..., places].flatten(1)


def _zero_points(words: Tensor, settings: PackedSettings) -> Tensor:
    """Zero points ``[groups, N]``. Version 1 stores zero - 1, and 0 - 1 wraps around.

    Programs differ on the latter. This is GPTQModel's way, the one program that still writes it: 2, 4 and 8 bits are
    counted up as whole words, with a carry into the neighbour, 3 bits each on its own.
    """
    nbits = settings.nbits
    if settings.version == "gptq" and nbits != 3:
        words = (words.long() + sum(1 << shift for shift in range(0, 32, nbits))).to(torch.int32)
    zeros = _unpack_columns(words, settings)
    return (zeros + 1) & 7 if settings.version == "gptq" and nbits == 3 else zeros


def _neighbours(index: Tensor, size: int) -> int:
    """The largest group size whose groups of neighbours each lie within one group of ``index``."""
    starts = (index[1:] != index[:-1]).nonzero().flatten() + 1
    if bool((starts % size == 0).all()):
        return size
    return math.gcd(*starts.tolist())
