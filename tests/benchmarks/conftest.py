"""Benchmarks on tiny weights."""

import pytest

from benchmarks import contender


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights would need thousands of copies to fill a cache."""
    monkeypatch.setattr(contender, "CACHE", 1 << 17)
