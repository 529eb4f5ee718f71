"""A seeded sample of `python -m faults`: calls of saves that go wrong, and memory that is refused."""

import pytest

from faults.__main__ import run
from faults.inject import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="injecting faults needs a C compiler: gcc, cc or clang")

FILES = ["save_model, shards over shards", "quantize --overwrite", "pack --overwrite"]


@pytest.mark.slow
def test_a_call_that_goes_wrong_leaves_the_old_or_the_new_files() -> None:
    rows = {row["name"]: row for row in run("files", FILES, seed=0, share=0.02)}
    assert {name: row["failures"] for name, row in rows.items() if row["failures"]} == {}
    assert rows.keys() == set(FILES)
    for name, row in rows.items():
        assert row["faults"] and row["old"] + row["absorbed"] + row["new"] == row["faults"], name
