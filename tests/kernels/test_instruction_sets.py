"""A new instruction set of the C++ kernels is one folder and one line, and its vectors are checked one by one."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hqqtensor.kernels import cpu

FOLDER = Path(cpu.__file__).parent
PROGRAM = Path(__file__).with_name("one_product.cpp")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def registered(kernels: Path) -> list[str]:
    text = (kernels / "dispatch" / "targets.h").read_text()
    return re.findall(r"^  TARGET\((\w+)\)", text, re.MULTILINE)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy of the kernels with a set "stub" besides: the portable one under another name."""
    for name in ("dispatch", "generic", "portable"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    shutil.copytree(FOLDER / "portable", tmp_path / "stub")
    for path in (tmp_path / "stub").iterdir():
        path.write_text(path.read_text().replace("portable", "stub"))
    targets = tmp_path / "dispatch" / "targets.h"
    first = f"  TARGET({registered(tmp_path)[0]})"
    text = targets.read_text()
    assert text.count(first) == 1
    targets.write_text(text.replace(first, f"  TARGET(stub) \\\n{first}"))
    return tmp_path


def compile_one(kernels: Path, source: Path, *flags: str) -> str:
    """Compiles to an object in ``kernels``; returns what the compiler says if it fails."""
    out = kernels / (source.parent.name + source.stem + ".o")
    command = ["g++", "-std=c++20", "-O0", "-iquote", str(kernels), *flags, "-c", str(source), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr if result.returncode else ""


def run(program: Path, name: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "HQQTENSOR_CPU"}
    if name is not None:
        env["HQQTENSOR_CPU"] = name
    return subprocess.run([str(program)], env=env, capture_output=True, text=True)


def test_a_folder_and_a_line_add_an_instruction_set(kernels: Path) -> None:
    absent = " ".join(f"X({name})" for name in registered(kernels) if name not in ("stub", "portable"))
    sources = [*kernels.glob("dispatch/*.cpp"), kernels / "stub/target.cpp", kernels / "portable/target.cpp", PROGRAM]
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda s: compile_one(kernels, s, f"-DABSENT_TARGETS(X)={absent}"), sources))
    assert not any(failed), "\n".join(failed)
    program = kernels / "product"
    subprocess.run(["g++", *map(str, kernels.glob("*.o")), "-o", str(program)], check=True)

    # The first of the list is the default; the environment variable takes every name of the list.
    for name, used in ((None, "stub"), ("stub", "stub"), ("portable", "portable")):
        result = run(program, name)
        assert result.returncode == 0 and result.stdout.split() == [used], (result.stdout, result.stderr)
    for name, said in (("amx", "but this processor lacks it"), ("sse9", "must be stub, amx, avx512, avx2 or portable")):
        result = run(program, name)
        assert result.returncode != 0 and said in result.stderr


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("floats.h", (r"\bf_fnma\b", "f_other"), "f_fnma"),
        ("floats.h", (r"inline float f_sum\(", "inline double f_sum("), "f_sum(a) must be of type float"),
        ("codes.h", (r"\bstore_codes\b", "other"), "store_codes"),
    ],
)
def test_a_missing_or_wrong_function_is_named_at_its_contract(
    kernels: Path, file: str, change: tuple[str, str], said: str
) -> None:
    path = kernels / "stub" / file
    path.write_text(re.sub(*change, path.read_text()))
    source = kernels / "check.cpp"
    source.write_text('#include "stub/target.h"\n#include "generic/vec_api.h"\n')
    errors = [line for line in compile_one(kernels, source).splitlines() if "error:" in line]
    # All of them at the line of vec_api.h that says what the function must do.
    assert len({line.split(":")[1] for line in errors}) == 1, errors
    assert all("vec_api.h" in line for line in errors) and said in errors[-1], errors
