"""Products of every kind against float64: how much of its bound each reaches.

test_cpu_numerics.py takes a part of them, ``python -m benchmarks.numerics_table`` all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bounds import (
    BOUNDS,
    GRADIENT_BOUNDS,
    HIGH_BOUND,
    HIGH_TABLE_BOUND,
    TABLE_BOUNDS,
    int8_rounding,
    size_of_sums,
    weight_rounding,
)
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.formats import get_format
from hqqtensor.kernels import cpu
from hqqtensor.ops.reference import activation_group, expand_groups, plain_meta
from hqqtensor.packing import pack, unpack

N, K = 36, 328
LIMIT = 2.0**126
"""Sums of more are left out, as docs/tensor.md has it."""


@dataclass(frozen=True)
class Layer:
    """A weight to be made: random codes, scales around ``size`` and zero points within the codes' range."""

    format: str
    nbits: int
    group_size: int | None
    axis: int
    size: float = 1.0
    meta_nbits: int | None = None  # of quantized scales and zero points


@dataclass(frozen=True)
class Path:
    """How a product is made."""

    name: str
    dtype: torch.dtype
    activation: str = "float"
    precision: str = "highest"


PATHS = [
    Path("float32", torch.float32),
    Path('float32, precision "high"', torch.float32, precision="high"),
    Path("bfloat16", torch.bfloat16),
    Path('bfloat16, activation "exact"', torch.bfloat16, "exact"),
    Path("float16", torch.float16),
    Path('float32, activation "int8"', torch.float32, "int8"),
    Path('bfloat16, activation "int8"', torch.bfloat16, "int8"),
]
WIDTHS = [("int", bits) for bits in range(1, 9)]
TABLES = [("fp4", 4), ("nf4", 4), ("fp6", 6), ("fp8", 8), ("codebook", 2), ("codebook", 4)]
LAYERS = [
    *[Layer(*f, size, axis) for f in WIDTHS + TABLES for size, axis in [(64, 1), (20, 1), (None, 1), (64, 0)]],
    *[
        Layer(*f, 64, axis, size)
        for f in [("int", 4), ("nf4", 4)]
        for axis in (0, 1)
        for size in (1e-30, 1e-10, 1e10, 1e30)
    ],
    *[Layer("int", bits, 16, axis, meta_nbits=m) for bits in (2, 4) for axis in (0, 1) for m in (4, 8)],
]
TOKENS = (1, 3, 17, 40)


def quantized_weight(layer: Layer) -> HQQTensor:
    generator = torch.manual_seed(layer.nbits)
    if layer.meta_nbits:
        w = torch.randn(N, K, generator=generator)
        meta = {"quant_scale": True, "quant_zero": True, "meta_nbits": layer.meta_nbits}
        return HQQTensor.from_hp(w, HqqConfig(layer.nbits, layer.group_size, axis=layer.axis, solver="rtn", **meta))
    extent = K if layer.axis == 1 else N
    size = min(layer.group_size or extent, extent)
    groups = -(-extent // size)
    meta = (N, groups) if layer.axis == 1 else (groups, K)
    codes = torch.randint(0, 2**layer.nbits, (N, K), generator=generator, dtype=torch.uint8)
    if layer.format == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    dtype = torch.float16 if layer.size == 1 else torch.float32
    scale = ((torch.rand(meta, generator=generator) + 0.1) * layer.size).to(dtype)
    zero = None
    if layer.format == "int":
        zero = (torch.rand(meta, generator=generator) * (2**layer.nbits - 1)).to(dtype)
    elif layer.format == "codebook":
        zero = torch.randn(1, 2**layer.nbits, generator=generator).sort().values
    settings = (layer.nbits, size, layer.axis, torch.Size((N, K)), torch.float32, layer.format)
    return HQQTensor(pack(codes, layer.nbits), scale, *settings, zero_point=zero)


@dataclass(frozen=True)
class Exact:
    """A weight in float64, ``[N, K]`` each: numbers, the span of what is summed, the largest number that a code can
    stand for, and scales of axis 0 (else None)."""

    weight: Tensor
    span: Tensor
    largest: Tensor
    column_scale: Tensor | None

    @classmethod
    def of(cls, q: HQQTensor) -> "Exact":
        scale, zero = (None if t is None else t.double() for t in plain_meta(q.operand()))
        fmt, size = get_format(q.format), (*q.shape, q.group_size, q.axis)
        scale = expand_groups(scale, *size)
        if fmt.has_zero_point:
            zero = expand_groups(zero, *size)
        weight = fmt.decode(unpack(q.qdata, q.nbits, q.shape[1]), scale, zero, q.nbits)
        # The zero point is taken out after the sum; tables become integers between their ends.
        table = zero if fmt.learned else None if fmt.has_zero_point else fmt.levels(q.nbits).values
        shift = zero if table is None else table.abs().max()
        ends = shift if table is not None else torch.maximum(zero.abs(), (2**q.nbits - 1 - zero).abs())
        span = 2 * (weight.abs() + (shift * scale).abs())
        return cls(weight, span, (ends * scale).abs(), scale if q.axis == 0 else None)


def activations(rows: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Kinds of finite activations, ``[rows, K]`` each, by name."""
    x = torch.randn(rows, K, generator=torch.manual_seed(rows))
    info = torch.finfo(dtype)
    yield "normal", x.to(dtype)
    outliers = x.clone()
    outliers[:, 5::64] *= 1e4
    yield "outliers", outliers.clamp(-info.max, info.max).to(dtype)
    some = x.clone()
    some[:, ::2] = 0
    some[:, 1::4] = -0.0
    yield "zeros of both signs", some.to(dtype)
    yield "nothing else", torch.full((rows, K), -0.0, dtype=dtype)
    yield "smallest", (x.sign() * info.smallest_normal * info.eps).to(dtype)
    yield "below normal", (x * info.smallest_normal / 4).to(dtype)
    if dtype != torch.float16:
        yield "1e-30", (x * 1e-30).to(dtype)
        yield "1e30", (x * 1e30).to(dtype)
    largest = torch.zeros(rows, K)
    largest[:, 7] = info.max
    yield "largest", largest.to(dtype)


def share(error: Tensor, bound: Tensor, dtype: torch.dtype) -> float:
    """The largest part of the bound that is reached. Below a dtype's normal numbers its steps have one size, and
    float32 sums have one, too."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 + K * 2.0**-149
    return (error / (bound + least)).max().item()


def in_range(want: Tensor, bound: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Where no sum can leave float32 and no result its dtype."""
    return (size < LIMIT) & (want.abs() + bound <= torch.finfo(dtype).max)


def forward_share(q: HQQTensor, exact: Exact, path: Path, x: Tensor) -> float:
    """The part of its bound that a product reaches; infinite for NaN or Inf where there should be none."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(path.precision)
        got = F.linear(x, q.to(path.dtype).with_data(activation=path.activation)).double()
    finally:
        torch.set_float32_matmul_precision(before)
    want, size = x.double() @ exact.weight.T, size_of_sums(x, exact.span, exact.column_scale)
    bound = size * forward_bound(q.format, path)
    if path.activation == "int8":
        bound += int8_bound(q, exact, x)
    error = torch.where(in_range(want, bound, size, path.dtype), (got - want).abs().nan_to_num(torch.inf, torch.inf), 0)
    return share(error, bound, path.dtype)


def int8_bound(q: HQQTensor, exact: Exact, x: Tensor) -> Tensor:
    """What 8-bit activations, and with AMX 8-bit weights, may change, ``[rows, N]``."""
    features = activation_group(q.group_size, q.axis, q.shape[1])
    if len(x) < 16 or q.axis == 0 or cpu.instruction_set() != "amx":
        return int8_rounding(x, exact.weight, features, exact.column_scale)
    return int8_rounding(x, exact.weight, 512) + weight_rounding(x, exact.largest, 512)


def forward_bound(format: str, path: Path) -> float:
    if path.precision == "high":
        return HIGH_BOUND if format == "int" else HIGH_TABLE_BOUND
    return (BOUNDS if format == "int" else TABLE_BOUNDS)[path.dtype]


def gradient_share(q: HQQTensor, exact: Exact, dtype: torch.dtype, grad: Tensor) -> float:
    """The same for the gradient of the activations; grad: ``[rows, N]``."""
    x = torch.zeros(len(grad), K, dtype=dtype, requires_grad=True)
    F.linear(x, q.to(dtype)).backward(grad)
    size = grad.double().abs() @ exact.weight.abs()
    want, bound = grad.double() @ exact.weight, size * GRADIENT_BOUNDS[dtype]
    representable = exact.weight.abs().max() <= torch.finfo(dtype).max  # the dense weight is made in the dtype
    # Torch's dense product may take numbers below the dtype's normal ones for zero; weights are rounded to such steps.
    least = torch.finfo(dtype).smallest_normal
    bound = bound + least * (1 + exact.weight.abs().sum(0) + grad.double().abs().sum(1, keepdim=True))
    inside = in_range(want, bound, size, dtype) & representable
    error = torch.where(inside, (x.grad.double() - want).abs().nan_to_num(torch.inf, torch.inf), 0)
    return share(error, bound, dtype)


def shares(
    layer: Layer, paths: list[Path] = PATHS, tokens: tuple[int, ...] = TOKENS
) -> Iterator[tuple[str, str, float]]:
    """Path, kind of activations and the part of the bound reached, for each product with one layer."""
    q = quantized_weight(layer)
    exact = Exact.of(q)
    for path in paths:
        for rows in tokens:
            for kind, x in activations(rows, path.dtype):
                yield path.name, f"{kind}, {rows} tokens", forward_share(q, exact, path, x)
        if path.activation == "float" and path.precision == "highest":
            for kind, grad in activations(tokens[-1], path.dtype):
                name = f"gradient, {str(path.dtype).removeprefix('torch.')}"
                yield name, kind, gradient_share(q, exact, path.dtype, grad[:, :N].contiguous())


def wrong_rows(layer: Layer, path: Path) -> list[str]:
    """What is wrong where one of four rows holds NaN, one Inf and one -Inf: NaN and Inf must stay in their rows, as
    IEEE arithmetic has them, and 8-bit activations make NaN of the whole row."""
    q = quantized_weight(layer)
    exact = Exact.of(q)
    wrong = []
    for rows in (4, 20):
        x = torch.randn(rows, K, generator=torch.manual_seed(5)).to(path.dtype)
        for row, bad in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
            x[row, 3] = bad
        got = F.linear(x, q.to(path.dtype).with_data(activation=path.activation)).double()
        want = x.double() @ exact.weight.T
        if path.activation == "int8":
            want[1:4] = torch.nan
        same = torch.where(want.isfinite(), got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
        wrong += [
            f"{rows} tokens, row {row}: {got[row, ~same[row]][:3].tolist()}"
            for row in (~same.all(1)).nonzero().flatten()
        ]
    return wrong
