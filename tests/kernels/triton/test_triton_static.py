"""Ahead-of-time compilation on a machine without a GPU: what every target must show for one width."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs Triton without TRITON_INTERPRET", allow_module_level=True)

from collections import Counter

from benchmarks.static_compile import LIMITS, Compiled
from benchmarks.triton_static import (
    Variant,
    compile_linear,
    fp16_time,
    problems,
    roofline,
    weights_a_turn,
    wide_loads_expected,
)
from hqqtensor.kernels.triton.config import TARGETS

PRODUCT = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "v_mfma"}


@pytest.mark.parametrize("arch", TARGETS)
def test_four_bits_compile_clean_for_every_target(arch: str) -> None:
    variant = Variant(arch, 1, 4)
    found = compile_linear(variant)
    assert problems(variant, found) == []
    assert found.tensor_instruction().startswith(PRODUCT[arch])
    assert 0 < found.occupancy(arch, variant.plan.tile.warps) <= 1
    assert 1 < found.instructions / weights_a_turn(variant) < 6


def test_hopper_multiplies_many_rows_with_wgmma() -> None:
    variant = Variant("sm_90", 128, 4)
    found = compile_linear(variant)
    assert found.tensor_instruction().startswith("HGMMA") and problems(variant, found) == []


def test_problems_are_found() -> None:
    variant = Variant("sm_90", 1, 4)
    enough = wide_loads_expected(variant)
    assert enough > 0
    good = Counter({"LDGSTS.E.BYPASS.128": enough, "HMMA.16816.F32": 8})
    assert problems(variant, Compiled(100, 0, 0, good, True)) == []
    assert "3 spills" in problems(variant, Compiled(100, 3, 0, good, True))
    assert "shared memory" in problems(variant, Compiled(100, 0, 240000, good, True))[0]
    narrow = Counter({"LDG.E.64": 2 * enough, "HMMA.16816.F32": 8})
    assert "loads of 128 bits" in problems(variant, Compiled(100, 0, 0, narrow, True))[0]
    assert problems(variant, Compiled(100, 0, 0, Counter({"LDG.E.128": enough}), True)) == [
        "no tensor-core instruction"
    ]


def test_the_roofline_names_what_binds() -> None:
    variant = Variant("sm_90", 1, 4)
    free, bound = roofline(variant, 0.0)
    assert bound == "memory" and fp16_time("sm_90", 1) / free == pytest.approx(3.55, abs=0.05)
    slow, bound = roofline(variant, 100.0)
    assert bound == "issue" and slow > free
    assert roofline(Variant("sm_90", 4096, 4), 0.0)[1] == "tensor"
    assert set(LIMITS) == set(TARGETS)
