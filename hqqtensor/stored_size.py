"""How many scales a weight has, in how many bits they are stored, and what a quantized weight takes in all."""

import math
from collections.abc import Sequence

import torch

from hqqtensor.config import HqqConfig
from hqqtensor.formats import get_format
from hqqtensor.packing import meta_bytes, row_bytes
from hqqtensor.solvers import column_scaled

META_GROUP = 128
"""Scales (or zero points) that share a float32 scale and zero point under quant_scale (or quant_zero)."""


def scale_shape(out_features: int, in_features: int, config: HqqConfig) -> tuple[int, int]:
    """Rows and columns of the scales of a weight ``[N, K]``."""
    if config.axis == 1:
        return out_features, -(-in_features // (config.group_size or in_features))
    return -(-out_features // (config.group_size or out_features)), in_features


def meta_width(nbits: int, columns: int) -> int:
    """Bits of quantized scales in rows of ``columns``: a single column takes a byte in any case, so it uses 8 bits."""
    return nbits if columns > 1 else 8


def codebook_dtype(config: HqqConfig) -> torch.dtype:
    """Storage dtype of learned entries, which lie within -1 and 1: that of scales, float16 where none was chosen."""
    return config.scale_dtype or torch.float16


def stored_bytes(shape: Sequence[int], config: HqqConfig, scale_dtype: torch.dtype = torch.float16) -> int:
    """Bytes of a weight ``[..., N, K]`` quantized with ``config``: ``HQQTensor.nbytes`` without quantizing it.

    scale_dtype: of plain scales and zero points where ``config`` leaves the choice to the weight's numbers.
    """
    *lead, out_features, in_features = shape
    matrices, fmt = math.prod(lead), get_format(config.format)
    rows, columns = scale_shape(out_features, in_features, config)
    dtype = config.scale_dtype or scale_dtype

    def of_groups(nbits: int | None) -> int:
        """Bytes of a scale (or zero point) for each group of a matrix."""
        if nbits is None:
            return rows * columns * dtype.itemsize
        meta_groups = -(-rows // min(META_GROUP, rows)) * columns
        return rows * meta_bytes(columns, meta_width(nbits, columns)) + meta_groups * 2 * torch.float32.itemsize

    total = matrices * (out_features * row_bytes(in_features, config.nbits) + of_groups(config.scale_nbits))
    if fmt.learned:
        codebooks = out_features if config.codebook == "row" else 1
        total += matrices * codebooks * 2**config.nbits * codebook_dtype(config).itemsize
    elif fmt.has_zero_point:
        total += matrices * of_groups(config.zero_nbits)
    has_act_pre_scale = config.solver == column_scaled.NAME or config.rotation
    return total + has_act_pre_scale * in_features * torch.float16.itemsize
