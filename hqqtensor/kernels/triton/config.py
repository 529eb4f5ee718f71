"""Tiles: shipped choices by architecture and shape, and the rule behind them where the table says nothing."""

from dataclasses import dataclass, replace

from hqqtensor.packing import PLANES

GROUP_SUMS, ROWS, ELEMENTS = 0, 1, 2
"""Ways of scaling, see ``linear.py``."""


@dataclass(frozen=True)
class Tile:
    """BLOCK_M by BLOCK_N outputs a program; UNROLL steps a turn of the loop, STAGES of them in flight."""

    block_m: int
    block_n: int
    unroll: int
    stages: int
    warps: int
    split_k: int = 1

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                raise ValueError(f"tile: {name} must be one of {list(allowed)}, got {value!r}")


_ALLOWED = {
    "block_m": (8, 16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "unroll": (1, 2, 4),
    "stages": (1, 2, 3, 4, 5, 6),
    "warps": (1, 2, 4, 8),
    "split_k": (1, 2, 4, 8, 16, 32, 64),
}


@dataclass(frozen=True)
class Device:
    """What the choice depends on: "sm_90", "gfx942" or another name, and how many programs fill it once."""

    arch: str
    processors: int


# Tiles, before K is split, by the most rows of x. Two warps keep Hopper and Blackwell on mma, whose operands come in
# registers in the shape that decoding leaves them; with more rows of x, four or eight warps bring wgmma and tcgen05.
_SHIPPED: dict[str, dict[int, Tile]] = {
    "sm_80": {
        8: Tile(8, 64, 2, 3, 2),
        16: Tile(16, 64, 2, 3, 2),
        32: Tile(32, 64, 1, 3, 2),
        64: Tile(64, 64, 1, 3, 4),
        1 << 30: Tile(128, 128, 1, 3, 8),
    },
    "sm_90": {
        8: Tile(8, 64, 2, 3, 2),
        16: Tile(16, 64, 2, 3, 2),
        32: Tile(32, 64, 1, 3, 2),
        64: Tile(64, 64, 1, 3, 4),
        1 << 30: Tile(128, 128, 1, 3, 8),
    },
    "sm_100": {
        8: Tile(8, 64, 2, 3, 2),
        16: Tile(16, 64, 2, 3, 2),
        32: Tile(32, 64, 1, 3, 2),
        64: Tile(64, 64, 1, 3, 4),
        1 << 30: Tile(128, 128, 1, 3, 8),
    },
    "gfx942": {
        16: Tile(16, 64, 1, 2, 1),
        1 << 30: Tile(64, 64, 1, 2, 1),
    },
}
TARGETS = tuple(_SHIPPED)
"""Architectures with choices of their own, all checked by ``benchmarks.triton_static``."""


def family(arch: str) -> str:
    """The shipped architecture whose tiles serve ``arch``."""
    if arch in _SHIPPED:
        return arch
    if arch.startswith("sm_"):
        return max(
            (a for a in ("sm_80", "sm_90", "sm_100") if int(a[3:]) <= int(arch[3:])), default="sm_80", key=_number
        )
    return "gfx942" if arch.startswith("gfx") else "sm_80"


def _number(arch: str) -> int:
    return int(arch[3:])


def shipped(arch: str) -> dict[int, Tile]:
    """Tiles by the most rows of x they serve."""
    return _SHIPPED[family(arch)]


@dataclass(frozen=True)
class Problem:
    """A product: x ``[experts, M, K]`` of a dtype's size in bytes, weights ``[experts, N, K]``."""

    M: int
    N: int
    K: int
    experts: int
    nbits: int
    group_size: int
    axis: int
    element_size: int
    table: bool = False  # numbers are looked up
    meta: tuple[int, int] = (0, 0)  # bits of quantized scales and zero points, 0 where they are plain


@dataclass(frozen=True)
class Plan:
    """How a problem is run: its way of scaling, bytes a row and positions a dot, blocks of codes, and its tile."""

    scale: int
    width: int
    run: int
    blocks: int
    blocks_a_split: int
    tile: Tile


def options(tile: Tile, arch: str) -> dict[str, int]:
    """Compiler options of a tile. The bound on registers is the hardware's own: said aloud, it keeps NVIDIA's assembler
    from spilling a few for the sake of more resident warps, which copies in flight make needless."""
    out = {"num_warps": tile.warps}
    if arch.startswith("sm_"):
        out["maxnreg"] = 255
    return out


SUMS_UP_TO = 64
"""Most rows of x for which groups are summed before they are scaled."""


def plan(problem: Problem, device: Device, tile: Tile | None = None) -> Plan:
    """The kernel's constants for a problem; ``tile`` overrides the shipped one (autotuning)."""
    scale, width, run = scaling(problem)
    steps = problem.K // 128
    if tile is None:
        table = shipped(device.arch)
        tile = table[min(rows for rows in table if rows >= problem.M)]
        kind = family(device.arch)
        sums = problem.M <= SUMS_UP_TO
        # What the table's tiles would spill, found by benchmarks.triton_static.
        if kind == "gfx942" and tile.block_m > 32 and (problem.nbits > 6 or (problem.nbits in (2, 5, 6) and sums)):
            tile = replace(tile, block_m=32, warps=1 if sums else 2)
        elif kind == "sm_80" and tile.block_m == 32 and problem.nbits > 4:
            tile = replace(tile, warps=4)
        elif kind == "sm_100" and width == 32 and tile.warps > 2:
            # Triton 3.7.1 compiles tcgen05 products of depth 32 with decoded operands to a kernel that does nothing.
            tile = Tile(32, 64, 1, 3, 2)
        if kind.startswith("sm_") and problem.element_size == 4 and tile.block_m > 32:
            tile = Tile(16, 32, 1, 2, 2) if kind == "sm_100" else Tile(16, 64, 1, 2, 4)
        elif kind == "gfx942" and problem.element_size == 4 and tile.block_m > 32 and sums:
            tile = replace(tile, block_m=32)
        tile = _fit(tile, problem, device, steps)
        if scale == ELEMENTS and kind == "gfx942" and (problem.nbits <= 4 or sums):
            tile = replace(tile, block_m=16, warps=1 if sums else 2)
        if scale == ELEMENTS:  # scales of every weight are in flight too
            tile = replace(
                tile, unroll=1, stages=min(tile.stages, 2), block_m=min(tile.block_m, 32 if kind == "gfx942" else 64)
            )
        if problem.axis == 0 and any(problem.meta):  # scales of every weight have scales of their own
            tile = replace(tile, block_n=16, block_m=min(tile.block_m, 32), warps=min(tile.warps, 2))
    splits = max(s for s in _ALLOWED["split_k"] if s <= min(tile.split_k, max(1, steps)))
    a_split = -(-steps // splits)
    unroll = tile.unroll
    while unroll > 1 and (a_split % unroll or steps % unroll):
        unroll //= 2
    return Plan(scale, width, run, steps, a_split, replace(tile, unroll=unroll, split_k=splits))


def scaling(problem: Problem) -> tuple[int, int, int]:
    """(way of scaling, bytes a row in one dot, positions of a byte that share a group)."""
    plane = max(2, PLANES[problem.nbits][0])
    whole = width = 16 * plane
    group = problem.group_size
    if problem.axis == 0:
        return ELEMENTS, width, 1
    while width > 32 and group % width and group < problem.K:
        width //= 2
    if group % width and group < problem.K:
        return ELEMENTS, whole, 1
    run = 1
    while width == whole and run < 8 // plane and (group % (whole * run * 2) == 0 or group >= problem.K):
        run *= 2
    return GROUP_SUMS if problem.M <= SUMS_UP_TO else ROWS, width, run


@dataclass(frozen=True)
class DensePlan:
    """How dense weights are made: bytes of a row at a time, whether one scale serves them, rows a program."""

    width: int
    row_scales: bool
    rows: int


WARPS_DENSE = 4


def options_dense(arch: str) -> dict[str, int]:
    """Compiler options of the kernels without a product; see ``options``."""
    return {"num_warps": WARPS_DENSE} | ({"maxnreg": 255} if arch.startswith("sm_") else {})


SOLVE_TILE = 1024
"""Weights that a program of the solvers holds: 8 a thread, so that all rounds stay in registers."""


def plan_dense(nbits: int, group_size: int, axis: int, warp: int = 32) -> DensePlan:
    """warp: threads of one. Rows are as many as give each thread 16 bytes."""
    whole = width = 16 * max(2, PLANES[nbits][0])
    while axis == 1 and width > 16 and group_size % width:
        width //= 2
    row_scales = axis == 1 and group_size % width == 0
    width = width if row_scales else whole
    return DensePlan(width, row_scales, max(16, 16 * WARPS_DENSE * warp // width))


def _fit(tile: Tile, problem: Problem, device: Device, steps: int) -> Tile:
    """Split K until the device is filled, and take less at a time where elements are wide."""
    wide = problem.element_size == 4
    tiles = -(-problem.M // tile.block_m) * -(-problem.N // tile.block_n) * problem.experts
    split = 1
    while (
        problem.M <= SUMS_UP_TO
        and tiles * split * tile.warps < device.processors * 16
        and steps // (split * 2) >= 4
        and split < 16
    ):
        split *= 2
    return replace(
        tile,
        unroll=1 if wide or problem.nbits == 8 or problem.table else tile.unroll,
        stages=min(tile.stages, 2) if wide else tile.stages,
        split_k=split,
    )
