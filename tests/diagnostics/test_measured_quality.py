"""What the package says of settings is what was measured."""

import json
from pathlib import Path

import pytest

from hqqtensor.diagnostics.measured_quality import CLASSES, MEASURED, quality_class

ROWS = json.loads((Path(__file__).parents[2] / "docs" / "data" / "quality.json").read_text())["rows"]


@pytest.mark.parametrize("name", MEASURED)
def test_a_row_is_that_of_the_documentation(name: str) -> None:
    measured = MEASURED[name]
    row = next(r for r in ROWS if r["task"] == measured.model and r["method"] == measured.method)
    assert measured.bits == pytest.approx(row["bits"], abs=5e-5)
    assert measured.kl == pytest.approx(row["main"][0], abs=5e-5)
    assert measured.agreement == pytest.approx(row["top1"], abs=5e-5)


def test_classes_follow_the_share_of_equal_tokens() -> None:
    assert [quality_class(share) for _, share in CLASSES] == [name for name, _ in CLASSES]
    assert quality_class(MEASURED["4"].agreement) == "good" and quality_class(MEASURED["2"].agreement) == "poor"
