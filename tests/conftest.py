"""Property tests try the same examples in every run of CI, others elsewhere: what they find is mended first."""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes many seconds; deselect with -m 'not slow'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: one that starts last would run alone, with the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def serves_hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, hqqtensor in the place of transformers' own quantizer for ``quant_method`` "hqq"."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from hqqtensor.integrations.transformers import register

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "hqq", AUTO_QUANTIZER_MAPPING["hqq"])  # put back at the end
    register(hqq=True)
