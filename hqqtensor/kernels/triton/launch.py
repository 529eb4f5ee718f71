"""The operators' CUDA, HIP and XPU implementations: from packed weights to kernel launches."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.kernels.triton import autotune, gcn, ptx
from hqqtensor.kernels.triton.config import (
    GROUP_SUMS,
    SOLVE_TILE,
    Device,
    Plan,
    Problem,
    options,
    options_dense,
    plan,
    plan_dense,
)
from hqqtensor.kernels.triton.dequantize import dequantize_kernel
from hqqtensor.kernels.triton.limits import members, why_not_solved
from hqqtensor.kernels.triton.linear import linear_kernel
from hqqtensor.kernels.triton.solve import assign_kernel, solve_kernel
from hqqtensor.kernels.triton.words import Decoder
from hqqtensor.ops import reference
from hqqtensor.ops.packed import PackedWeight
from hqqtensor.packing import PLANES, meta_bits, row_bytes

MINIFLOATS = {"fp4": 1, "fp6": 2, "fp8": 3}
"""Mantissa bits of the formats that are decoded by moving bits."""
_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
DTYPES = tuple(_TL)


@dataclass(frozen=True)
class _Weight:
    """What every kernel needs of a packed weight ``[experts, N, K]``: tensors, and constants by the kernels' names."""

    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    constants: dict[str, Any]
    experts: int


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """x ``[..., K]`` times the transpose of a packed weight ``[N, K]``, plus bias: ``[..., N]`` in x's dtype."""
    if activation == "int8":
        return reference.linear(x, w, bias, act_pre_scale, activation)
    weight = _weight(w._replace(qdata=w.qdata.unsqueeze(0)))
    out = _product(x.reshape(1, -1, w.in_features), weight, bias, act_pre_scale)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def batched_linear(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """x ``[E, M, K]`` times the transpose of each of E packed weights ``[E, N, K]``: ``[E, M, N]``."""
    if activation == "int8":
        return reference.batched_linear(x, w, act_pre_scale, activation)
    return _product(x, _weight(w), None, act_pre_scale)


def grouped_linear(
    x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str
) -> Tensor:
    """Rows of x ``[S, K]`` in runs, run e (up to offsets[e]) times the transpose of weight e of ``[E, N, K]``:
    ``[S, N]``; rows from offsets[-1] on are zero. Nothing waits for the offsets to reach the host."""
    if activation == "int8":
        return reference.grouped_linear(x, offsets, w, act_pre_scale, activation)
    return _product(x.unsqueeze(0), _weight(w), None, act_pre_scale, offsets).squeeze(0)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dense weights ``[..., N, K]`` of ``dtype`` from packed rows ``[..., N, row_bytes]``."""
    weight = _weight(w._replace(qdata=w.qdata.reshape(-1, *w.qdata.shape[-2:])))
    return _dense(weight, None, dtype).reshape(*w.qdata.shape[:-1], w.in_features)


def embedding(indices: Tensor, w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows ``indices`` (any shape, int) of packed weights ``[N, K]``; one outside 0 .. N - 1 gives a row of NaN, for an
    error would have to wait for the device."""
    weight = _weight(w._replace(qdata=w.qdata.unsqueeze(0)))
    return _dense(weight, indices.reshape(-1).contiguous(), dtype).reshape(*indices.shape, w.in_features)


def solve(matrix: Tensor, nbits: int, group_size: int, axis: int, solver: str) -> tuple[Tensor, Tensor]:
    """Inverse scales and zero points, float32, of ``[N, K]``: ``[N, groups]`` (axis 1) or ``[groups, K]`` (axis 0).

    solver: "rtn", or "hqq_joint" with norm 2. ValueError for another, or for groups that are too long.
    """
    N, K = matrix.shape
    groups = -(-(K if axis == 1 else N) // group_size)
    longest = members(N, K, group_size, axis)
    reason = why_not_solved(solver, 2.0, "int", longest)
    if reason is not None:
        raise ValueError(reason)
    padded = max(16, triton.next_power_of_2(longest))
    shape = (N, groups) if axis == 1 else (groups, K)
    inverse = torch.empty(shape, dtype=torch.float32, device=matrix.device)
    zero = torch.empty_like(inverse)
    block = max(1, SOLVE_TILE // padded)
    solve_kernel[(-(-inverse.numel() // block),)](
        matrix.contiguous(), inverse, zero, N, K, groups, group_size,
        NBITS=nbits, JOINT=solver == "hqq_joint", AXIS=axis, MEMBERS=padded, BLOCK_G=block,
        **options_dense(describe(matrix.device).arch),
    )  # fmt: skip
    return inverse, zero


def assign(
    out: Tensor, matrix: Tensor, inverse: Tensor, zero_point: Tensor, nbits: int, group_size: int, axis: int
) -> None:
    """Pack the nearest integer codes of ``[N, K]`` into ``out``, uint8 ``[N, row_bytes]``; scales as from ``solve``."""
    N, K = matrix.shape
    expected = (N, row_bytes(K, nbits))
    if out.dtype != torch.uint8 or tuple(out.shape) != expected or not out.is_contiguous():
        raise ValueError(f"out must be contiguous uint8 {list(expected)}, got {out.dtype} {list(out.shape)}")
    rows, columns = inverse.shape
    block = 16
    assign_kernel[(-(-N // block), -(-K // 128))](
        out, matrix.contiguous(), inverse.float().contiguous(), zero_point.float().contiguous(), N, K, out.shape[1],
        columns, rows, NBITS=nbits, GROUP=group_size, AXIS=axis, BLOCK_R=block,
    )  # fmt: skip


def _weight(w: PackedWeight) -> _Weight:
    qdata, scale, zero_point, meta, nbits, format, group_size, axis, in_features = w
    if qdata.shape[-1] != row_bytes(in_features, nbits):
        raise ValueError(
            f"packed rows of {in_features} codes of {nbits} bits take {row_bytes(in_features, nbits)} bytes, "
            f"got {qdata.shape[-1]}"
        )
    none = _placeholder(qdata.device)
    kind, mantissa, table = 0, 0, none
    if format == "codebook":
        if zero_point is None:
            raise ValueError("format 'codebook' needs its entries in the place of zero_point")
        kind, table, zero_point = 2, _entries(zero_point, qdata), None
    elif format in MINIFLOATS:
        kind, mantissa = 1, MINIFLOATS[format]
    elif format != "int":
        kind, table = 2, _table(format, nbits, qdata.device)
    tensors = {"qdata": qdata.contiguous(), "scale": scale.contiguous(), "zero": none, "table": table}
    tensors["shifts"] = shift_table(qdata.device, nbits)
    if zero_point is not None:
        tensors["zero"] = zero_point.contiguous()
    columns = -(-in_features // group_size) if axis == 1 else in_features
    bits, rows, pairs = {}, {}, iter(meta or ())
    for name, values in (("scale", scale), ("zero", zero_point)):
        bits[name] = 0 if values is None else _bits(values, columns)
        own = [next(pairs).contiguous() for _ in range(2)] if bits[name] else [none, none]
        if bits[name] and any(_bits(t, columns) for t in own):
            raise TypeError("quantized scales and zero points need scales and zero points that are not")
        tensors[f"{name}_scale"], tensors[f"{name}_zero"] = own
        rows[name] = own[0].shape[-2]
    sizes = {
        "N": qdata.shape[-2],
        "K": in_features,
        "row_bytes": qdata.shape[-1],
        "columns": columns,
        "scale_rows": scale.shape[-2],
        "scale_meta_rows": rows["scale"],
        "zero_meta_rows": rows["zero"],
    }
    constants = {
        "NBITS": nbits, "KIND": kind, "MANTISSA": mantissa, "PER_ROW": kind == 2 and table.ndim > 1,
        "GROUP": group_size, "AXIS": axis, "HAS_ZERO": zero_point is not None,
        "META_SCALE": bits["scale"], "META_ZERO": bits["zero"],
    }  # fmt: skip
    return _Weight(tensors, sizes, constants, qdata.shape[0])


def _bits(values: Tensor, columns: int) -> int:
    """In how many bits each the scales or zero points of rows of ``columns`` are quantized, 0 where they are not."""
    if values.dtype == torch.uint8:
        return meta_bits(columns, values.shape[-1])
    if values.shape[-1] != columns:
        raise ValueError(f"rows of {columns} scales or zero points hold as many numbers, got {list(values.shape)}")
    return 0


def _product(
    x: Tensor, weight: _Weight, bias: Tensor | None, pre: Tensor | None, offsets: Tensor | None = None
) -> Tensor:
    """x ``[E, M, K]``, or ``[1, S, K]`` in runs that end before ``offsets``."""
    if x.dtype not in DTYPES:
        raise TypeError(f"activations must be one of {[str(d) for d in DTYPES]}, got {x.dtype}")
    M, N, K, experts = x.shape[1], weight.sizes["N"], weight.sizes["K"], weight.experts
    device = describe(x.device)
    make = x.new_empty if offsets is None else x.new_zeros
    out = make(*x.shape[:2], N, dtype=_computed(x.dtype, device))
    if out.numel() == 0:
        return out.to(x.dtype)
    constants = weight.constants
    usual = M if offsets is None else -(-M // experts)
    about = (constants["NBITS"], constants["GROUP"], constants["AXIS"], x.element_size(), constants["KIND"] == 2)
    problem = Problem(usual, N, K, experts, *about, (constants["META_SCALE"], constants["META_ZERO"]))
    x = x.contiguous()

    def run(chosen: Plan) -> None:
        _launch(x, weight, bias, pre, offsets, out, device, chosen)

    run(autotune.choose(problem, device, str(x.dtype), constants["KIND"], run) or plan(problem, device))
    return out.to(x.dtype)


def _launch(
    x: Tensor, weight: _Weight, bias: Tensor | None, pre: Tensor | None, offsets: Tensor | None, out: Tensor,
    device: Device, chosen: Plan,
) -> None:  # fmt: skip
    none = _placeholder(x.device)
    tile, N, K = chosen.tile, weight.sizes["N"], weight.sizes["K"]
    M, experts, padded = x.shape[1], x.shape[0], 0
    tiles = -(-M // tile.block_m)
    if offsets is not None:
        # Each expert may end in a tile that is not full.
        tiles, padded = tiles + weight.experts, triton.next_power_of_2(weight.experts)
        offsets = torch.nn.functional.pad(offsets.to(torch.int32), (0, padded - weight.experts), mode="constant")
        offsets = torch.cummax(offsets, 0).values
    tiles *= -(-N // tile.block_n)
    partial = arrived = none
    if tile.split_k > 1:
        partial = x.new_empty(experts * tiles * tile.split_k * tile.block_n * tile.block_m, dtype=torch.float32)
        arrived = x.new_zeros(experts * tiles, dtype=torch.int32)
    about = (device, weight.constants["KIND"], weight.constants["NBITS"], x.dtype, chosen)
    pair = pair_of(*about)
    # Words must not cross the ends of rows.
    if K % 2 or x.data_ptr() % 4 or weight.sizes["row_bytes"] % 2 or weight.tensors["qdata"].data_ptr() % 2:
        pair = 1
    decoder = decoder_of(*about, pair)
    shifts = shift_table(x.device, weight.constants["NBITS"], decoder.shifts)
    tensors = {**weight.tensors, "shifts": shifts}
    linear_kernel[(tiles, tile.split_k, experts)](
        x=x, bias=none if bias is None else bias.contiguous(), pre=none if pre is None else pre.contiguous(),
        offsets=none if offsets is None else offsets, out=out, partial=partial, arrived=arrived, M=M,
        blocks=chosen.blocks, blocks_a_split=chosen.blocks_a_split, HAS_BIAS=bias is not None, HAS_PRE=pre is not None,
        EXPERTS=padded, RAGGED=chosen.blocks * 128 < K, DOT=_TL[_computed(x.dtype, device)],
        PAIR=pair, PRECISION=precision(device),
        SCALE=chosen.scale, SPLIT_K=tile.split_k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WIDTH=chosen.width,
        RUN=chosen.run, UNROLL=tile.unroll, STAGES=tile.stages, **options(tile, device.arch), **tensors,
        **weight.sizes, **weight.constants, **decoding_constants(decoder),
    )  # fmt: skip


def _dense(weight: _Weight, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    qdata, K = weight.tensors["qdata"], weight.sizes["K"]
    rows = weight.sizes["N"] if indices is None else indices.numel()
    out = qdata.new_empty(weight.experts, rows, K, dtype=_computed(dtype, describe(qdata.device)))
    if out.numel() == 0:
        return out.to(dtype)
    constants, device = weight.constants, describe(qdata.device)
    found = plan_dense(constants["NBITS"], constants["GROUP"], constants["AXIS"], 64 if "gfx" in device.arch else 32)
    dequantize_kernel[(-(-rows // found.rows), -(-K // 128), weight.experts)](
        indices=_placeholder(qdata.device) if indices is None else indices, out=out, R=rows, blocks=K // 128,
        HAS_INDICES=indices is not None, ROW_SCALES=found.row_scales, WIDTH=found.width, BLOCK_R=found.rows,
        **options_dense(device.arch), **weight.tensors, **weight.sizes, **constants,
    )  # fmt: skip
    return out.to(dtype)


def _computed(dtype: torch.dtype, device: Device) -> torch.dtype:
    """The dtype of products and results: float32 for bfloat16 under the interpreter, which computes with its bits."""
    return torch.float32 if device.arch == "interpreter" and dtype == torch.bfloat16 else dtype


def pair_of(device: Device, kind: int, nbits: int, dtype: torch.dtype, chosen: Plan) -> int:
    """Bytes of a word that the linear kernel loads packed codes by. AMD's instructions take two bytes in a 16-bit lane
    as they come, where bytes one by one must be joined; columns of x are then split in two tiles, which pays while
    there are few rows of them."""
    few = chosen.scale == GROUP_SUMS and chosen.tile.block_m <= 16 and dtype != torch.float32
    return 2 if few and kind == 0 and nbits < 8 and device.arch.startswith("gfx9") else 1


def decoder_of(device: Device, kind: int, nbits: int, dtype: torch.dtype, chosen: Plan, pair: int = 1) -> Decoder:
    """How the linear kernel decodes: by the plain form of ``decode.py`` all but integer codes on NVIDIA and AMD.

    Codes are exact where they are scaled one by one, in float32 products, and at 2, 4 and 8 bits, whose planes need
    neither shifting nor joining; otherwise products take their offsets off. Those of 1 bit differ within a group, which
    takes sums, and registers, of each: more than many rows of x leave.
    """
    many = nbits == 1 and chosen.tile.block_m > 16
    exact = chosen.scale != GROUP_SUMS or dtype == torch.float32 or nbits in (2, 4, 8) or many
    half = "bf16" if dtype == torch.bfloat16 else "fp16"
    if kind == 0 and device.arch.startswith("sm_"):
        return ptx.decoder(nbits, half, exact)
    if kind == 0 and device.arch.startswith("gfx9") and nbits < 8:  # 8 bits are bytes, which the compiler converts
        if chosen.scale != GROUP_SUMS:
            half = "fp16"  # holds every code
        return gcn.decoder(nbits, half, exact and half == "fp16", pair == 2)
    if kind == 0 and device.arch == "interpreter":  # the arithmetic of offsets, without the text
        return Decoder(offsets=ptx.decoder(nbits, half, exact).offsets)
    return Decoder()


def decoding_constants(decoder: Decoder) -> dict[str, Any]:
    """The linear kernel's constants of a decoder."""
    return {
        "ASM": decoder.text, "CONSTRAINTS": decoder.constraints,
        "CONSTANTS": " ".join(str(c - (c >> 31 << 32)) for c in decoder.constants),
        "HALF": tl.bfloat16 if decoder.half == "bf16" else tl.float16,
        "OFFSETS": " ".join(map(str, decoder.offsets)),
    }  # fmt: skip


def precision(device: Device) -> str:
    """How products of float32 are taken: three tensor-core products on NVIDIA, plain float32 elsewhere."""
    return "tf32x3" if device.arch.startswith("sm_") else "ieee"


@cache
def describe(device: torch.device) -> Device:
    """Architecture and number of processors; "interpreter" for CPU tensors (under TRITON_INTERPRET=1)."""
    if device.type == "cpu":
        return Device("interpreter", 4)
    if device.type == "xpu":
        return Device("xpu", torch.xpu.get_device_properties(device).max_compute_units)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


@cache
def _placeholder(device: torch.device) -> Tensor:
    """Stands in for tensors that a kernel's constants say it does not read."""
    return torch.zeros(1, 16, dtype=torch.uint8, device=device)


@cache
def shift_table(device: torch.device, nbits: int, shifts: tuple[tuple[int, int], ...] = Decoder.shifts) -> Tensor:
    """How far to shift the bits of planes that lie in the same byte for several columns: 64 columns of the second plane
    (at 1 bit, the first), 64 of the third. shifts: ``words.Decoder``."""
    columns = torch.arange(64)
    planes = PLANES[nbits] if nbits == 1 else PLANES[nbits][1:]
    parts = []
    for plane, (base, factor) in zip((*planes, 1, 1)[:2], (*shifts, (0, 1))[:2], strict=True):
        parts.append((base + factor * (columns // (16 * plane) * plane)).clamp(min=0))
    return torch.cat(parts).to(torch.uint8).to(device)


def _entries(entries: Tensor, qdata: Tensor) -> Tensor:
    """Learned entries as float32 ``[2**nbits]``, or a row of them for each row of each expert."""
    if entries.numel() == entries.shape[-1]:
        return entries.flatten().float().contiguous()
    return entries.float().expand(*qdata.shape[:-1], entries.shape[-1]).contiguous()


@cache
def _table(format: str, nbits: int, device: torch.device) -> Tensor:
    """The numbers that the codes of a format without a zero point stand for."""
    codes = torch.arange(2**nbits, dtype=torch.uint8)
    return get_format(format).decode(codes, torch.ones(()), None, nbits).to(torch.float32).to(device)
