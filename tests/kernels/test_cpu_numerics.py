"""Products of every kind against float64, with activations and weights of every size, within the bounds of the docs."""

import re
from pathlib import Path as File

import bounds
import pytest
import torch
from numerics import LAYERS, PATHS, Layer, Path, shares, wrong_rows

from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

ODD = [*LAYERS[::11], Layer("fp8", 8, 64, 1), Layer("int", 4, 64, 1, 1e-30), Layer("nf4", 4, 64, 0, 1e10)]


def named(case: Layer | Path) -> str:
    return (
        case.name
        if isinstance(case, Path)
        else f"{case.format}{case.nbits} g{case.group_size} axis {case.axis} {case.size}"
    )


@pytest.mark.parametrize("layer", ODD, ids=named)
def test_products_and_gradients_stay_within_their_bounds(layer: Layer) -> None:
    beyond = [(path, kind, reached) for path, kind, reached in shares(layer, tokens=(1, 17)) if reached > 1]
    assert not beyond, beyond[:5]


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_nan_and_inf_stay_in_the_rows_that_have_them(path: Path) -> None:
    wrong = {named(layer): found for layer in LAYERS[::3] if layer.size == 1 and (found := wrong_rows(layer, path))}
    assert not wrong, wrong


def test_the_bounds_in_the_docs_are_those_of_the_tests() -> None:
    page = (File(__file__).parents[2] / "docs" / "numerics.md").read_text()
    cells = re.findall(r"^\| (.*) \| (2\^.*) \| (2\^.*) \|$", page, re.M)

    def value(text: str) -> float:
        return sum(2.0 ** int(power) for power in re.findall(r"2\^(-\d+)", text))

    stated = {name: (value(integers), value(tables)) for name, integers, tables in cells}
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    assert stated == {
        "float32": (bounds.BOUNDS[f32], bounds.TABLE_BOUNDS[f32]),
        'float32, precision "high"': (bounds.HIGH_BOUND, bounds.HIGH_TABLE_BOUND),
        "bfloat16": (bounds.BOUNDS[bf16], bounds.TABLE_BOUNDS[bf16]),
        "float16": (bounds.BOUNDS[f16], bounds.TABLE_BOUNDS[f16]),
        **{f"gradient, {str(d)[6:]}": (bounds.GRADIENT_BOUNDS[d],) * 2 for d in (f32, bf16, f16)},
    }
