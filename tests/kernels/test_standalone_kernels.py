"""Random calls of the kernels with buffers between pages that cannot be touched, on every instruction set here."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / "objects-c++"
SETS = ("amx", "avx512", "avx2", "portable")
LINKED = [
    *(OBJECTS / "dispatch" / f"{name}.o" for name in ("attention", "decoder", "linear", "product")),
    *(OBJECTS / name / "target.o" for name in SETS),
]


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Path) -> None:
    if shutil.which("c++") is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler here, or other instruction sets")
    if missing := [path for path in LINKED if not path.exists()]:
        pytest.skip(f"no objects of a build here: {missing[0]}")

    def compiled(source: Path) -> Path:
        out = tmp_path / f"{source.stem}.o"
        include = ["-iquote", str(ROOT / "hqqtensor" / "kernels" / "cpu")]
        subprocess.run(["c++", "-std=c++20", "-O0", *include, "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted((Path(__file__).parent / "standalone").glob("*.cpp"))))
    program = tmp_path / "standalone"
    subprocess.run(["c++", *map(str, [*objects, *LINKED]), "-lpthread", "-o", str(program)], check=True)
    result = subprocess.run([program, "--seconds", "0.5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    ran = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert "portable" in ran and set(ran) <= set(SETS)
    for line in result.stdout.splitlines():
        assert line.endswith("all well") and "product" in line, line
