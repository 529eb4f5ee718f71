"""Pages and examples run in this process: what they change in other libraries is put back."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _puts_back_who_serves_hqq() -> Iterator[None]:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["hqq"]
    yield
    AUTO_QUANTIZER_MAPPING["hqq"] = before
