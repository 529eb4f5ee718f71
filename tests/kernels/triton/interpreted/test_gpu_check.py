"""The comparisons of ``benchmarks.gpu_check`` by Triton's interpreter: they pass, and notice what is wrong."""

import pytest
import torch

from benchmarks import gpu_check
from hqqtensor.kernels.triton import launch


@pytest.mark.parametrize(
    "name",
    ["linear int3 g64 axis1 M=1 K=512 float16", "linear int4 g48 axis1 M=3 K=328 bfloat16",
     "linear int2 g32 axis0 M=5 K=256 float32", "linear nf4 M=1", "experts int5 grouped=False",
     "experts int4 grouped=True", "dequantize int6 axis0 K=200", "embedding int1 axis1 K=128", "rtn int4 axis1",
     "hqq_joint int3 axis0"],
)  # fmt: skip
def test_a_comparison_of_each_kind_passes(name: str) -> None:
    (case,) = [case for case in gpu_check.cases("cpu") if case.name == name]
    assert case.error() <= 1


def test_wrong_results_and_failures_are_reported(monkeypatch) -> None:
    def wrong(*args):
        if args[1].nbits == 8:
            raise RuntimeError("does not compile")
        return torch.zeros(args[0].shape[0], 96, dtype=args[0].dtype)

    monkeypatch.setattr(launch, "linear", wrong)
    chosen = [case for case in gpu_check.cases("cpu") if case.name.endswith("axis1 M=1 K=512 float16")]
    lines, good = gpu_check.correctness(iter(chosen))
    assert not good and f"{len(chosen)} comparisons" in lines[2] and f"{len(chosen)} out of bounds" in lines[2]
    assert any("int8" in line and "does not compile" in line for line in lines)
