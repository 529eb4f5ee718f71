"""Builds the CPU kernels as one plain shared library; everything else is in pyproject.toml.

The library uses torch's stable ABI and no symbol of Python, so one build serves every Python from 3.11 and every torch
from ``OLDEST_TORCH`` on. Torch's headers are needed: install torch first and pass ``--no-build-isolation``.

CXX: the compiler, "c++" unless set. HQQTENSOR_NO_KERNELS=1: no library. HQQTENSOR_SANITIZE=1,
thread or trap: see ``make sanitize``, ``make sanitize-threads`` and ``make sanitize-clang``.
HQQTENSOR_GLIBC=2.17: a library for every Linux with that C library or a newer one, see ``make wheel``.
``setup.py build_kernels``: the kernels' objects alone, which need no torch; what builds the library then links them.
"""

import importlib.util
import os
import platform
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
# What HQQTENSOR_SANITIZE asks for. At -O3 gcc takes too long over sanitized kernels; `make guard` has the loops of -O3.
SANITIZERS = {
    "1": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=alignment"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "trap": ["-O1", "-g1", "-fsanitize=undefined", "-fsanitize-trap=undefined", "-fno-sanitize=alignment"],
}


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
    """One source, its object file and the command that compiles it, without either."""

    source: Path
    object: Path
    command: list[str]


@dataclass(frozen=True)
class Toolchain:
    """The compilers and their flags, as the environment asks for them."""

    kernels: list[str]
    runtime: list[str]
    sanitizers: list[str]
    suffix: str  # of the folder of objects

    @classmethod
    def of_environment(cls) -> "Toolchain":
        kernels = shlex.split(os.environ.get("CXX", "c++"))
        runtime, glibc = kernels, os.environ.get("HQQTENSOR_GLIBC")
        if glibc is not None:
            # zig has the symbols of old C libraries, and links its own C++ library in. The kernels call neither, so the
            # other compiler makes them, as fast as in any build.
            runtime = [sys.executable, "-m", "ziglang", "c++", "-target", f"x86_64-linux-gnu.{glibc}"]
        sanitize = os.environ.get("HQQTENSOR_SANITIZE")
        if sanitize is None:
            return cls(kernels, runtime, [], "")
        if sanitize not in SANITIZERS:
            raise SystemExit(f"HQQTENSOR_SANITIZE must be one of {list(SANITIZERS)}, got {sanitize!r}")
        return cls(kernels, runtime, SANITIZERS[sanitize], "sanitized" if sanitize == "1" else f"sanitized-{sanitize}")

    def compiled(self, source: Path) -> Compiled:
        """How ``source`` is compiled. Objects of one compiler share a folder, whichever build they were made for."""
        is_kernel = source.parent.name not in NEED_RUNTIME
        compiler = self.kernels if is_kernel else self.runtime
        # gcc takes more than twice as long for portable/ at -O3, and an x86-64 of the last ten years has a better set.
        level = "-O2" if source.parent.name == "portable" and platform.machine() == "x86_64" else "-O3"
        flags = [level, *(self.sanitizers or ["-g0"]), "-std=c++20", "-ffp-contract=off", "-fPIC"]
        flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-iquote", str(FOLDER.resolve())]
        # Messages name source files: without the folders of this machine, so that all machines build the same bytes.
        flags += [f"-ffile-prefix-map={Path.cwd()}/="]
        if not is_kernel:
            flags += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-isystem", str(torch_folder() / "include")]
            flags += [f"-ffile-prefix-map={torch_folder()}/=torch/"]
        words = [Path(word).name for word in compiler if not word.startswith("-")]
        folder = Path("build", "-".join(["objects", *words, *([self.suffix] if self.suffix else [])]))
        place = folder / source.relative_to(FOLDER).with_suffix(".o")
        return Compiled(source.resolve(), place.resolve(), [*compiler, *flags])

    def link(self, files: list[Compiled], library: Path) -> list[str]:
        command = [*self.runtime, "-shared", *(self.sanitizers or ["-s", "-Wl,-z,defs"]), "-o", str(library)]
        return [*command, *(str(file.object) for file in files), f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]


class BuildLibrary(build_ext):
    """Compiles with ninja where it is installed, which repeats only what changed; else everything, in parallel.

    Objects lie in ``build/``, so that editable installs and wheels share them.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # without the tag of one Python

    def build_extension(self, ext: Extension) -> None:
        toolchain = Toolchain.of_environment()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        files = [toolchain.compiled(Path(source)) for source in ext.sources]
        build(files, toolchain.link(files, library), self.verbose)


class BuildKernels(build_ext):
    """Compiles the kernels' objects alone, for ``BuildLibrary`` to link later. They need no torch."""

    def build_extension(self, ext: Extension) -> None:
        toolchain = Toolchain.of_environment()
        sources = [Path(source) for source in ext.sources if Path(source).parent.name not in NEED_RUNTIME]
        build([toolchain.compiled(source) for source in sources], None, self.verbose)


def build(files: list[Compiled], link: list[str] | None, verbose: bool) -> None:
    """Compile ``files``, then run ``link``."""
    for folder in {file.object.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    # Beside this Python too: pip does not put a virtual environment's programs into PATH.
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is not None:
        run_ninja(ninja, files, link, verbose)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[*file.command, "-c", str(file.source), "-o", str(file.object)] for file in files]
        list(pool.map(subprocess.check_call, commands))
    if link is not None:
        subprocess.check_call(link)


def run_ninja(ninja: str, files: list[Compiled], link: list[str] | None, verbose: bool) -> None:
    """Write ``build/build.ninja`` and run it. All builds share its log, which says what each object was compiled by."""

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
    for file in files:
        lines += [f"build {escaped(file.object)}: compile {escaped(file.source)}"]
        lines += [f"  compiler = {command(file.command)}"]
    objects = " ".join(escaped(file.object) for file in files)
    lines += ["rule link", f"  command = {command(link)}"] if link is not None else []
    lines += [f"build library: {'phony' if link is None else 'link'} {objects}", "default library", ""]
    Path("build", "build.ninja").write_text("\n".join(lines))
    subprocess.check_call([ninja, *(["-v"] if verbose else ["--quiet"])], cwd="build")


if os.environ.get("HQQTENSOR_NO_KERNELS") == "1":  # the plain path alone
    setup()
else:
    sources = sorted(str(path) for path in FOLDER.rglob("*.cpp"))
    depends = sorted(str(path) for path in FOLDER.rglob("*.h"))
    setup(
        ext_modules=[
            Extension("hqqtensor.kernels.cpu.libhqqtensor_cpu", sources, depends=depends, py_limited_api=True)
        ],
        cmdclass={"build_ext": BuildLibrary, "build_kernels": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
