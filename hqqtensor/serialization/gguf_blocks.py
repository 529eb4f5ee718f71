"""Blocks of GGUF tensors as HQQTensors: codes, scales and zero points of groups along in_features.

A block holds 32 or 256 weights of a row. Symmetric types: value = d * (code - half), kept as it is. Others:
value = d * code + m, where the zero point becomes -m / d, rounded to float32. Super-blocks (Q4_K, Q5_K, Q6_K) have
a scale d times a small integer for every 16 or 32 weights; the product is exact in float32.
Layouts: ggml's ``block_*`` structures, described in its GGUF and quantization documents.
"""

import torch
from torch import Tensor

from hqqtensor.packing import pack
from hqqtensor.serialization.gguf_file import GgufFile, GgufTensor
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.tensor import HQQTensor

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDTHS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def read_tensor(file: GgufFile, tensor: GgufTensor) -> Tensor:
    """A dense tensor in the file's dtype, or an HQQTensor that presents float32.

    CheckpointError naming the tensor where its scales are not finite or it is quantized and no matrix.
    """
    data = file.bytes_of(tensor)
    if tensor.kind in _DENSE:
        return data.view(_DENSE[tensor.kind]).view(tensor.shape)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.name}: a quantized tensor of shape {list(tensor.shape)} is no matrix")
    rows, columns = tensor.shape
    codes, scale, low = _decode(tensor.kind, data.view(rows, -1))
    if not bool(scale.isfinite().all()) or (isinstance(low, Tensor) and not bool(low.isfinite().all())):
        raise CheckpointError(f"{tensor.name}: its scales hold NaN or Inf")
    nbits, size = _WIDTHS[tensor.kind], columns // scale.shape[-1]
    if isinstance(low, Tensor):
        flat = scale == 0  # every code of such a group stands for m: code 0 with zero point -1 and scale m
        codes = codes.view(rows, -1, size).masked_fill(flat[..., None], 0).view(rows, columns)
        zero = torch.where(flat, -1.0, -low / torch.where(flat, 1.0, scale))
        scale = torch.where(flat, low, scale)
        low = torch.where(flat, 0.0, low)
    else:
        zero = torch.full_like(scale, low)
    if bool((scale.half().float() == scale).all()) and _same(scale, zero, low, nbits):
        scale, zero = scale.half(), zero.half()
    shape = torch.Size(tensor.shape)
    return HQQTensor(pack(codes, nbits), scale, nbits, size, 1, shape, torch.float32, zero_point=zero)


def _same(scale: Tensor, zero: Tensor, low: Tensor | float, nbits: int) -> bool:
    """Whether float16 zero points give scale * code + low to the last bit, for every code."""
    half = zero.half().float()
    if not isinstance(low, Tensor):
        return bool((half == zero).all())
    return all(bool(((code - half) * scale == scale * code + low).all()) for code in range(2**nbits))


def _decode(kind: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Codes ``[N, K]``, scale ``[N, groups]`` in float32, and the zero point, or the m of value = scale * code + m."""
    if kind.endswith("_K"):
        return _decode_super(kind, rows)
    sizes = {"Q4_0": (2, 16), "Q4_1": (2, 2, 16), "Q5_0": (2, 4, 16), "Q5_1": (2, 2, 4, 16), "Q8_0": (2, 32)}[kind]
    d, *middle, q = rows.view(rows.shape[0], -1, sum(sizes)).split(sizes, -1)
    scale = _float(d)
    if kind == "Q8_0":
        return (q ^ 0x80).flatten(1), scale, 128.0  # int8 + 128
    codes = torch.cat([q & 15, q >> 4], -1)
    if kind in ("Q5_0", "Q5_1"):
        codes = codes | _bits(middle[-1]) << 4
    low: Tensor | float = _float(middle[0]) if kind in ("Q4_1", "Q5_1") else {"Q4_0": 8.0, "Q5_0": 16.0}[kind]
    return codes.flatten(1), scale, low


def _decode_super(kind: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    if kind == "Q6_K":
        low, high, small, d = rows.view(rows.shape[0], -1, 210).split((128, 64, 16, 2), -1)
        # Two halves of 128 weights; of each, 64 bytes of low nibbles and 32 of four high pairs of bits.
        low, high = low.unflatten(-1, (2, 1, 64)), high.unflatten(-1, (2, 1, 32))
        nibbles = torch.cat([low & 15, low >> 4], -2).flatten(-2)
        pairs = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -2).flatten(-2)
        scale = _float(d)[..., None] * small.view(torch.int8).float()
        return (nibbles | pairs << 4).flatten(1), scale.flatten(1), 32.0
    sizes = (2, 2, 12, 128) if kind == "Q4_K" else (2, 2, 12, 32, 128)
    d, dmin, packed, *high, q = rows.view(rows.shape[0], -1, sum(sizes)).split(sizes, -1)
    q = q.unflatten(-1, (4, 1, 32))
    codes = torch.cat([q & 15, q >> 4], -2).flatten(-3, -2)  # [..., 8, 32]
    if high:
        codes = codes | torch.stack([high[0] >> i & 1 for i in range(8)], -2) << 4
    # Eight scales and eight minima of 6 bits in 12 bytes: the first four of each plainly, with the high bits of the
    # other four above them; those have their low four bits together in the last four bytes.
    s, m, rest = packed.split((4, 4, 4), -1)
    small = torch.cat([s & 63, (rest & 15) | s >> 6 << 4], -1)
    minimum = torch.cat([m & 63, rest >> 4 | m >> 6 << 4], -1)
    scale, least = _float(d)[..., None] * small, _float(dmin)[..., None] * minimum
    return codes.flatten(1), scale.flatten(1), -least.flatten(1)


def _float(halves: Tensor) -> Tensor:
    """Bytes ``[..., 2]`` of a float16, as float32 ``[...]``."""
    return halves.contiguous().view(torch.float16).squeeze(-1).float()


def _bits(words: Tensor) -> Tensor:
    """The 32 bits of four bytes, lowest first, as uint8 ``[..., 32]``."""
    return (words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
