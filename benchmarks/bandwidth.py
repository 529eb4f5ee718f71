"""How fast this machine reads memory, by several loops of which the fastest counts."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

PREFIX = "read: "


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """read_loop.c built with the C compiler of the machine, or None where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_loop.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_loop.so"
        flags = ["-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library), "-lpthread"], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_loop.restype = ctypes.c_uint64
    loaded.read_loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return loaded


class ReadLoops:
    """Loops over one buffer larger than the caches. ``runs`` are timed beside the contenders."""

    def __init__(self, nbytes: int = 128 << 20) -> None:
        self.buffer = torch.ones(nbytes // 4)
        self.runs: dict[str, Callable[[], object]] = {PREFIX + "torch.sum": self.buffer.sum}
        library = _compiled()
        if library is not None:
            for streams in (1, 4):
                args = (self.buffer.data_ptr(), nbytes, torch.get_num_threads(), streams)
                self.runs[f"{PREFIX}C, {streams} a thread"] = functools.partial(library.read_loop, *args)

    def bandwidth(self, times: Mapping[str, float]) -> tuple[float, str]:
        """Bytes a second of the fastest loop in ``times`` (seconds by name), and that loop's name."""
        best = min((name for name in times if name.startswith(PREFIX)), key=lambda name: times[name])
        return self.buffer.nbytes / times[best], best.removeprefix(PREFIX)
