"""Lets one call of libc in this process go wrong, through the library that ``preload.c`` becomes."""

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OPS = (
    "open", "create", "read", "write", "sync", "truncate", "rename", "unlink", "mkdir", "mmap", "close", "copy",
    "memory",
)  # fmt: skip
"""Kinds, in the order of preload.c: "create" opens to write, "unlink" is rmdir too, "copy" is between files."""

FILE_OPS = OPS[:-1]
_NONE, _ERROR, _ERRORS, _SHORT, _KILL, _TORN, _INTERRUPT = range(7)
_LOG = 65536


class _State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("at", "mask", "fault", "error", "threshold", "count", "hits")),
        ("folder", ctypes.c_char * 4096),
        ("log", ctypes.c_uint8 * _LOG),
    )


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which kinds of calls. ``stays``: so do all such calls after the first."""

    name: str
    kind: int
    ops: tuple[str, ...]
    error: int = 0

    @property
    def stays(self) -> bool:
        return self.kind == _ERRORS

    @property
    def kills(self) -> bool:
        return self.kind in (_KILL, _TORN)

    @property
    def interrupts(self) -> bool:
        return self.kind == _INTERRUPT


_SPACE = ("create", "write", "sync", "truncate", "mkdir", "copy")
COUNT = Fault("count", _NONE, FILE_OPS)
FILE_FAULTS = (
    Fault("error (EIO)", _ERROR, FILE_OPS, errno.EIO),
    Fault("errors from then on (EIO)", _ERRORS, FILE_OPS, errno.EIO),
    Fault("disk full from then on (ENOSPC)", _ERRORS, _SPACE, errno.ENOSPC),
    Fault("not allowed (EACCES)", _ERROR, ("open", "create", "rename", "unlink", "mkdir"), errno.EACCES),
    Fault("interrupted call (EINTR)", _ERROR, ("open", "create", "read", "write", "sync", "truncate"), errno.EINTR),
    Fault("half of a read or write", _SHORT, ("read", "write", "copy")),
    Fault("kill", _KILL, FILE_OPS),
    Fault("kill after half of a write", _TORN, ("write",)),
    Fault("Ctrl-C", _INTERRUPT, FILE_OPS),
)
COUNT_MEMORY = Fault("count", _NONE, ("memory",))
MEMORY_FAULTS = (
    Fault("no memory, once", _ERROR, ("memory",), errno.ENOMEM),
    Fault("no memory from then on", _ERRORS, ("memory",), errno.ENOMEM),
)


def compiler() -> str | None:
    """A C compiler; None where there is none."""
    return next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile preload.c into ``folder``."""
    library = folder / "faults.so"
    program = compiler()
    if program is None:
        raise RuntimeError("injecting faults needs a C compiler: gcc, cc or clang")
    source = Path(__file__).with_name("preload.c")
    subprocess.run([program, "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run_preloaded(library: Path, arguments: list[str]) -> int:
    """``python -m faults.inside ARGUMENTS`` in a process that has the library; its exit code."""
    environment = {
        **os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "faults.inside", *arguments]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1]).returncode


class Injector:
    """The faults of one child at a time: ``set`` before the fork, ``arm`` in the child, ``log`` after its end."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(_State))  # shared with children
        self._state = _State.from_buffer(self._memory)
        self._arm = ctypes.CDLL(None).faults_arm

    def set(self, fault: Fault, at: int, folder: Path, threshold: int = 2**62) -> None:
        """Let the ``at``-th call go wrong, from 1 on, of those that ``fault`` is about.

        folder: whose files count. threshold: bytes from which a request for memory counts.
        """
        state = self._state
        state.at, state.fault, state.error, state.threshold = at, fault.kind, fault.error, threshold
        state.mask = sum(1 << OPS.index(op) for op in fault.ops)
        state.count = state.hits = 0
        state.folder = os.fsencode(folder)

    def arm(self) -> None:
        """Begin, in this process."""
        self._arm(ctypes.byref(self._state))

    def disarm(self) -> None:
        """End, in this process."""
        self._arm(None)

    @property
    def log(self) -> list[str]:
        """The kinds of the calls that were counted."""
        return [OPS[op] for op in self._state.log[: min(self._state.count, _LOG)]]

    @property
    def hits(self) -> int:
        """How many calls went wrong."""
        return self._state.hits
