"""Processes that die in the middle of their work, for tests of what they leave behind."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


def run_script(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code (indented as a whole or not) in a process of its own, which can import this module."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def kill_at(step: int, *functions: tuple[Any, str]) -> None:
    """Let the ``step``-th call of any of the functions, each given by its owner and its name, kill this process."""
    count = 0

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in functions:
        setattr(owner, name, wrap(getattr(owner, name)))
