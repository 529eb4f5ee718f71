"""Builds the CPU kernels as one plain shared library; everything else is in pyproject.toml.

The library uses torch's stable ABI and no symbol of Python, so one build serves every Python from 3.11 and every torch
from ``OLDEST_TORCH`` on. Torch's headers are needed: install torch first and pass ``--no-build-isolation``.

CXX: the compiler, "c++" unless set. HQQTENSOR_NO_KERNELS=1: no library. HQQTENSOR_SANITIZE=1: see ``make sanitize``.
HQQTENSOR_GLIBC=2.17: a library for every Linux with that C library or a newer one, see ``make wheel``.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = "0x020b000000000000"  # 2.11: the first whose stable ABI makes tensors of memory with a deleter
FOLDER = Path("hqqtensor/kernels/cpu")
NEED_RUNTIME = ("torch", "dispatch")  # folders whose code calls the C++ library
SANITIZERS = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=alignment"]


def torch_folder() -> Path:
    """Where torch is installed; it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "hqqtensor's CPU kernels are compiled against torch: install torch first and pass --no-build-isolation "
            "(or set HQQTENSOR_NO_KERNELS=1 to go without them)"
        )
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Compiled:
    """One source, its object file and the compiler for it."""

    source: Path
    object: Path
    compiler: list[str]


class BuildLibrary(build_ext):
    """Compiles with ninja where it is installed, which repeats only what changed; else everything, in parallel.

    Objects lie in ``build/``, so that editable installs and wheels share them.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # without the tag of one Python

    def build_extension(self, ext: Extension) -> None:
        torch, sanitize = torch_folder(), os.environ.get("HQQTENSOR_SANITIZE") == "1"
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        kernels = shlex.split(os.environ.get("CXX", "c++"))
        runtime, glibc = kernels, os.environ.get("HQQTENSOR_GLIBC")
        if glibc is not None:
            # zig has the symbols of old C libraries, and links its own C++ library in. The kernels call neither, so the
            # other compiler makes them, as fast as in any build.
            runtime = [sys.executable, "-m", "ziglang", "c++", "-target", f"x86_64-linux-gnu.{glibc}"]
        # Sanitized code is optimized as much: at -O1 other loops would be tested than those that ship.
        flags = ["-O3", *(SANITIZERS if sanitize else ["-g0"]), "-std=c++20", "-ffp-contract=off", "-fPIC"]
        flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        flags += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-iquote", str(FOLDER.resolve())]
        flags += ["-isystem", str(torch / "include")]
        folder = Path(
            "build", "-".join(["objects", Path(kernels[0]).name, *(["sanitized"] if sanitize else [])])
        ).resolve()
        files = []
        for source in map(Path, ext.sources):
            is_kernel = source.parent.name not in NEED_RUNTIME
            place = folder if is_kernel or glibc is None else folder / f"glibc-{glibc}"
            compiler = [*(kernels if is_kernel else runtime), *flags]
            files.append(Compiled(source.resolve(), place / source.relative_to(FOLDER).with_suffix(".o"), compiler))
        for path in {library.parent, *(file.object.parent for file in files)}:
            path.mkdir(parents=True, exist_ok=True)
        link = [*runtime, "-shared", *(SANITIZERS if sanitize else ["-s", "-Wl,-z,defs"]), "-o", str(library)]
        link += [*(str(file.object) for file in files), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if shutil.which("ninja"):
            run_ninja(folder, files, link, self.verbose)
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[*file.compiler, "-c", str(file.source), "-o", str(file.object)] for file in files]
            list(pool.map(subprocess.check_call, commands))
        subprocess.check_call(link)


def run_ninja(folder: Path, files: list[Compiled], link: list[str], verbose: bool) -> None:
    """Write ``build.ninja`` into ``folder`` and run it."""

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += ["rule link", f"  command = {command(link)}"]
    for file in files:
        lines += [f"build {escaped(file.object)}: compile {escaped(file.source)}"]
        lines += [f"  compiler = {command(file.compiler)}"]
    lines += [f"build library: link {' '.join(escaped(file.object) for file in files)}", "default library", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    subprocess.check_call(["ninja", *(["-v"] if verbose else ["--quiet"])], cwd=folder)


if os.environ.get("HQQTENSOR_NO_KERNELS") == "1":  # the plain path alone
    setup()
else:
    sources = sorted(str(path) for path in FOLDER.rglob("*.cpp"))
    depends = sorted(str(path) for path in FOLDER.rglob("*.h"))
    setup(
        ext_modules=[
            Extension("hqqtensor.kernels.cpu.libhqqtensor_cpu", sources, depends=depends, py_limited_api=True)
        ],
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
