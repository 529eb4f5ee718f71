"""These tests need TRITON_INTERPRET=1 from the start; ``test_triton_interpreted.py`` runs them in such a process."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the part of the tests that INTERPRETED_PART names: "1/4" is every fourth one from the second on."""
    part, _, parts = os.environ.get("INTERPRETED_PART", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]
