"""HQQTENSOR_BATCH_INVARIANT=1: a row of a product does not depend on how many rows come with it (docs/numerics.md).

Where it is not set, vLLM's switch VLLM_BATCH_INVARIANT=1 asks for the same.
"""

import os

if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
    os.environ.setdefault("HQQTENSOR_BATCH_INVARIANT", "1")  # the kernels read this name
_value = os.environ.get("HQQTENSOR_BATCH_INVARIANT", "0")
if _value not in ("0", "1"):
    raise ValueError(f"HQQTENSOR_BATCH_INVARIANT must be 0 or 1, got {_value!r}")
BATCH_INVARIANT = _value == "1"
"""Read once, when hqqtensor is imported; the C++ kernels read the variable at their first product."""
