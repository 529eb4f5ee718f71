"""How many examples property tests of the kernels try."""

import os


def examples(count: int) -> int:
    """``count``; a third where HQQTENSOR_CPU says that the tests run once more, for another instruction set."""
    return count // 3 if os.environ.get("HQQTENSOR_CPU") else count
