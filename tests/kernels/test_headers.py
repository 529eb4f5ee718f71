"""Every header of the C++ kernels can be opened by itself, as an editor does: it includes what it uses."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hqqtensor.kernels import cpu

FOLDER = Path(cpu.__file__).parent
# The folder that knows torch needs torch's headers as well.
HEADERS = sorted(path.relative_to(FOLDER) for path in FOLDER.glob("*/*.h") if path.parent.name != "torch")
X86_ONLY = {"avx2", "avx512", "amx"}


def errors(compiler: str, header: Path) -> str:
    """What the compiler says about a file that includes ``header`` twice and nothing else; empty if all is well."""
    source = f'#include "{header}"\n#include "{header}"\n'
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run([*command, "-iquote", str(FOLDER)], input=source, capture_output=True, text=True)
    # A header alone does not use all that it defines.
    unused = ("-Wunused-function", "-Wunused-const-variable", "-Wunused-variable", "-Wunneeded-internal-declaration")
    said = [line for line in result.stderr.splitlines() if "error:" in line or "warning:" in line]
    return "\n".join(line for line in said if not any(name in line for name in unused))


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_header_compiles_alone(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    served = platform.machine() in ("x86_64", "AMD64")
    headers = [h for h in HEADERS if served or h.parent.name not in X86_ONLY]
    assert len(headers) > 10
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(headers, pool.map(lambda h: errors(compiler, h), headers), strict=True))
    wrong = {str(header): text for header, text in said.items() if text}
    assert not wrong, "\n".join(f"{name}:\n{text}" for name, text in wrong.items())


def test_only_the_folder_torch_knows_torch() -> None:
    for path in FOLDER.glob("*/*"):
        if path.parent.name == "torch" or path.suffix not in (".h", ".cpp"):
            continue
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if "ATen" in line or "torch" in line or "c10" in line], path
