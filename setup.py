"""Builds the CPU kernels as one plain shared library; everything else is in pyproject.toml.

The library uses torch's stable ABI and no symbol of Python, so one build serves every Python from 3.11 and every torch
from ``OLDEST_TORCH`` on. Torch's headers are needed: install torch first and pass ``--no-build-isolation``.

CXX: the compiler, "c++" unless set. HQQTENSOR_NO_KERNELS=1: no library. HQQTENSOR_SANITIZE=1: see ``make sanitize``.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = "0x020b000000000000"  # 2.11: the first whose stable ABI makes tensors of memory with a deleter
FOLDER = Path("hqqtensor/kernels/cpu")
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


class BuildLibrary(build_ext):
    """Compiles with ninja where it is installed, which repeats only what changed; else everything, in parallel."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # without the tag of one Python

    def build_extension(self, ext: Extension) -> None:
        torch, sanitize = torch_folder(), os.environ.get("HQQTENSOR_SANITIZE") == "1"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        # Sanitized code is optimized as much: at -O1 other loops would be tested than those that ship.
        flags = ["-O3", *(SANITIZERS if sanitize else ["-g0"]), "-std=c++20", "-ffp-contract=off", "-fPIC"]
        flags += [
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        ]
        flags += ["-iquote", str(FOLDER.resolve()), "-isystem", str(torch / "include")]
        library, temp = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        objects = {
            temp / Path(source).relative_to(FOLDER).with_suffix(".o"): Path(source).resolve() for source in ext.sources
        }
        for folder in {library.parent, *(path.parent for path in objects)}:
            folder.mkdir(parents=True, exist_ok=True)
        link = [*compiler, "-shared", *(SANITIZERS if sanitize else ["-s", "-Wl,-z,defs"]), "-o", str(library)]
        link += [*map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if shutil.which("ninja"):
            self.run_ninja(temp, objects, [*compiler, *flags], link)
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [[*compiler, *flags, "-c", str(source), "-o", str(path)] for path, source in objects.items()]
            list(pool.map(subprocess.check_call, compiled))
        subprocess.check_call(link)

    def run_ninja(self, temp: Path, objects: dict[Path, Path], compile: list[str], link: list[str]) -> None:
        escaped = {
            path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            for path in [*objects, *objects.values()]
        }
        command, linking = (shlex.join(words).replace("$", "$$") for words in (compile, link))
        lines = [
            f"rule compile\n  command = {command} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        ]
        lines += [f"rule link\n  command = {linking}"]
        lines += [f"build {escaped[path]}: compile {escaped[source]}" for path, source in objects.items()]
        lines += [f"build library: link {' '.join(escaped[path] for path in objects)}", "default library\n"]
        (temp / "build.ninja").write_text("\n".join(lines))
        subprocess.check_call(["ninja", *(["-v"] if self.verbose else ["--quiet"])], cwd=temp)


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
