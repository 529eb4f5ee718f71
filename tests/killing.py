"""Processes that die in the middle of their work, for tests of what they leave behind."""

import os
import signal
from typing import Any


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
