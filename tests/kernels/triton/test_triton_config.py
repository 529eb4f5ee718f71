"""The choice of tiles: what every plan must satisfy for the kernel to be right. Needs neither Triton nor a GPU."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqqtensor.kernels.triton.config import (
    ELEMENTS,
    GROUP_SUMS,
    ROWS,
    SUMS_UP_TO,
    TARGETS,
    Device,
    Problem,
    Tile,
    family,
    plan,
    shipped,
)
from hqqtensor.packing import PLANES

PROBLEMS = st.builds(
    Problem,
    M=st.integers(1, 5000),
    N=st.integers(1, 20000),
    K=st.integers(1, 20000),
    experts=st.sampled_from([1, 8, 64]),
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([1, 4, 8, 16, 24, 32, 48, 64, 96, 100, 128, 192, 256, 1024, 20000]),
    axis=st.sampled_from([0, 1]),
    element_size=st.sampled_from([2, 4]),
)
DEVICES = st.builds(
    Device, st.sampled_from([*TARGETS, "sm_86", "sm_120", "gfx90a", "xpu", "interpreter"]), st.integers(1, 300)
)


@given(PROBLEMS, DEVICES)
def test_plans_cover_every_block_once_and_no_dot_straddles_groups(problem: Problem, device: Device) -> None:
    found = plan(problem, device)
    plane = max(2, PLANES[problem.nbits][0])
    whole = 16 * plane
    assert whole % found.width == 0 and found.width >= 32
    assert found.blocks == problem.K // 128
    # Splits tile the blocks, and turns tile the splits.
    assert found.blocks_a_split * found.tile.split_k >= found.blocks
    assert found.blocks % found.tile.unroll == 0 and found.blocks_a_split % found.tile.unroll == 0
    if found.scale != ELEMENTS:
        span = 16 * plane * found.run if found.run > 1 else found.width
        assert problem.axis == 1
        assert problem.group_size % span == 0 or problem.group_size >= problem.K
        assert found.scale == (GROUP_SUMS if problem.M <= SUMS_UP_TO else ROWS)
        assert found.run == 1 or found.width == whole


@given(PROBLEMS, st.sampled_from(TARGETS), st.sampled_from([1, 2, 8, 64]))
def test_a_tile_given_from_outside_is_made_to_fit(problem: Problem, arch: str, split: int) -> None:
    tile = replace(shipped(arch)[1 << 30], unroll=4, split_k=split)
    found = plan(problem, Device(arch, 100), tile)
    assert found.tile.split_k <= split and found.blocks_a_split * found.tile.split_k >= found.blocks
    assert found.blocks % found.tile.unroll == 0 and found.blocks_a_split % found.tile.unroll == 0


def test_common_groups_are_never_scaled_weight_by_weight() -> None:
    for nbits in range(1, 9):
        for size in (32, 64, 128):
            for M in (1, 128):
                problem = Problem(M, 4096, 4096, 1, nbits, size, 1, 2)
                assert plan(problem, Device("sm_90", 132)).scale != ELEMENTS


def test_few_rows_fill_the_device_by_splitting_k() -> None:
    problem = Problem(1, 1024, 8192, 1, 4, 64, 1, 2)
    assert plan(problem, Device("sm_90", 132)).tile.split_k > 1
    assert plan(replace(problem, N=200000), Device("sm_90", 132)).tile.split_k == 1


@pytest.mark.parametrize(
    ("arch", "serves"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_75", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
     ("sm_120", "sm_100"), ("gfx942", "gfx942"), ("gfx90a", "gfx942"), ("xpu", "sm_80")],
)  # fmt: skip
def test_architectures_without_their_own_table_take_the_nearest(arch: str, serves: str) -> None:
    assert family(arch) == serves


def test_bad_tiles_are_named() -> None:
    with pytest.raises(ValueError, match="warps must be one of"):
        Tile(8, 64, 1, 3, 3)
    with pytest.raises(ValueError, match="block_n"):
        Tile(8, 48, 1, 3, 2)
    with pytest.raises(ValueError, match="stages"):
        Tile(8, 64, 1, True, 2)
