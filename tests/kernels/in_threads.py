"""Calls made by several threads at a time."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wrong_results(calls: Sequence[Callable[[], Tensor]], want: Sequence[Tensor], rounds: int) -> list[int]:
    """Which calls, each made ``rounds`` times in a thread of its own, gave something else than ``want``."""
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(rounds):
            if not torch.equal(calls[i](), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return wrong
