"""Random arguments for the compiled operators, without torch: each call ends in an error or in the right numbers."""

import importlib.util
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / "objects-c++"
HERE = Path(__file__).parent
CPU = ROOT / "hqqtensor" / "kernels" / "cpu"
# What the program has in their place: tests/kernels/standalone/runtime.cpp.
REPLACED = {CPU / "torch" / "threads.cpp", CPU / "dispatch" / "scratch.cpp", CPU / "dispatch" / "select.cpp"}


@pytest.mark.slow
def test_no_argument_gets_past_the_checks(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("torch")
    if shutil.which("c++") is None or platform.machine() != "x86_64" or spec is None or spec.origin is None:
        pytest.skip("no C++ compiler or no torch here, or other instruction sets")
    built = [path for path in CPU.rglob("*.cpp") if path not in REPLACED]
    linked = [OBJECTS / path.relative_to(CPU).with_suffix(".o") for path in built]
    if missing := [path for path in linked if not path.exists()]:
        pytest.skip(f"no objects of a build here: {missing[0]}")
    includes = [f"-iquote{folder}" for folder in (CPU, HERE / "standalone", HERE / "arguments")]
    includes += ["-isystem", str(Path(spec.origin).parent / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]

    def compiled(source: Path) -> Path:
        out = tmp_path / f"{source.stem}.o"
        subprocess.run(["c++", "-std=c++20", "-O0", *includes, "-c", str(source), "-o", str(out)], check=True)
        return out

    sources = [path for path in sorted((HERE / "arguments").glob("*.cpp")) if path.name != "coverage.cpp"]
    sources = [*sources, HERE / "standalone" / "runtime.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = tmp_path / "arguments"
    subprocess.run(["c++", *map(str, [*objects, *linked]), "-lpthread", "-o", str(program)], check=True)
    result = subprocess.run([program, "--inputs", "500"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    served = dict(re.findall(r" (\w+) (\d+),", result.stdout))
    assert result.stdout.endswith("all well\n")
    assert {"linear", "grouped_linear", "attention", "_lloyd", "_decoder_run", "dequantize"} <= set(served)
