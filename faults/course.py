"""Long runs: whether every thread still gets on, and whether what was sampled grows."""

import time
from typing import NamedTuple

import torch


class Watch:
    """Threads that must finish something every ``limit`` seconds, not counting those in which the whole process was
    stopped from outside."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._latest: dict[str, float] = {}

    def begins(self, thread: str) -> None:
        """``thread`` begins the next piece of its work."""
        self._latest[thread] = time.monotonic()

    def sleep(self, interval: float) -> list[str]:
        """Sleep for so long; what there is to say then about threads that stand still."""
        before = time.monotonic()
        time.sleep(interval)
        now = time.monotonic()
        pause = now - before - interval
        if pause > 5:
            self._latest = {name: at + pause for name, at in list(self._latest.items())}
        return [
            f"{name}: finished nothing for {self.limit:.0f} s"
            for name, at in list(self._latest.items())  # threads add to it
            if now - at > self.limit
        ]


class Growth(NamedTuple):
    """How samples went on from the second quarter of a run: the first and the last, the slope an hour by least squares,
    its standard error, and how many hours the run took."""

    first: float
    last: float
    slope: float
    error: float
    hours: float

    @classmethod
    def of(cls, seconds: list[float], samples: list[float], blocks: int = 12) -> "Growth":
        """Means of blocks are fitted: samples that follow one another are not independent. The first quarter is left
        out, in which pools and caches fill. Without enough samples the error is infinite."""
        start = len(seconds) // 4
        x, y, hours = seconds[start:], samples[start:], seconds[-1] / 3600
        size = len(x) // blocks
        if size < 1:
            return cls(y[0], y[-1], 0.0, float("inf"), hours)
        a, b = (torch.tensor(v[: size * blocks], dtype=torch.float64).view(blocks, size).mean(1) for v in (x, y))
        da, db = a - a.mean(), b - b.mean()
        gradient = float((da * db).sum() / (da * da).sum())
        left = db - gradient * da
        error = float(((left * left).sum() / (blocks - 2) / (da * da).sum()).sqrt())
        return cls(y[0], y[-1], 3600 * gradient, 3600 * error, hours)

    def is_real(self, least: float) -> bool:
        """Whether it is told from noise and came to more than ``least`` within the run."""
        return self.slope > 3 * self.error and self.slope * self.hours > least

    def line(self, what: str, unit: str, scale: float) -> str:
        """For people; one ``unit`` is ``scale`` of what was sampled."""
        first, last, slope, error = (v / scale for v in self[:4])
        return f"{what}: {first:.1f} to {last:.1f} {unit}, {slope:+.2f} +- {error:.2f} {unit} an hour"
