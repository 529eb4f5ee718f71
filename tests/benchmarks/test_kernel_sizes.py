"""Bytes of kernels by function."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import kernel_sizes

SOURCE = """
namespace hqqtensor { namespace {
template <int N> __attribute__((noinline)) int tile(int x) { return x * N; }
} int both(int x) { return tile<3>(x) + tile<5>(x); } }
"""


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="needs g++ and nm")
def test_instances_of_a_template_are_one_row(tmp_path: Path) -> None:
    for name in kernel_sizes.SETS:
        (tmp_path / name).mkdir()
        command = ["g++", "-O1", "-x", "c++", "-", "-c", "-o", str(tmp_path / name / "target.o")]
        subprocess.run(command, input=SOURCE, text=True, check=True)
    found = kernel_sizes.main(["--objects", str(tmp_path)])
    assert found["avx2"]["tile"][1] == 2 and found["avx2"]["both"][1] == 1
    assert 0 < found["avx2"]["tile"][0] < 200


def test_objects_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernel_sizes.main(["--objects", str(tmp_path)])
    assert "build the kernels first" in capsys.readouterr().err
