"""The GPU benchmarks on a machine without a GPU: they say so and end with a status of their own."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["gpu_check", "gpu_linear"])
def test_without_a_gpu_they_say_so(module: str, tmp_path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", f"benchmarks.{module}", "--report", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and f"benchmarks.{module} needs a CUDA or HIP device" in run.stderr
    assert not report.exists()
