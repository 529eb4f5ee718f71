"""A format registered after import is served by the compiled kernels as those that came with the package."""

import functools
from collections.abc import Iterator

import pytest
import torch

from hqqtensor import HqqConfig, HQQTensor, backend, ops
from hqqtensor.formats import Levels, TableFormat, base, register_format
from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


_VALUES = torch.linspace(-1, 1, 8) ** 3
LATE = TableFormat("late3", _VALUES, Levels.between(_VALUES), torch.arange(8, dtype=torch.uint8))


@functools.cache
def _register_once() -> None:
    """The kernels' table stays for the process's life, so it can be given to them once."""
    register_format(LATE)


@pytest.fixture
def late() -> Iterator[TableFormat]:
    _register_once()
    base._FORMATS["late3"] = LATE
    yield LATE
    del base._FORMATS["late3"]  # other tests list the formats


def test_its_products_and_numbers_come_from_the_kernels(late: TableFormat) -> None:
    q = HQQTensor.from_hp(torch.randn(24, 128, generator=torch.manual_seed(0)), HqqConfig(3, 32, format="late3"))
    w, x = q.operand(), torch.randn(4, 128, generator=torch.manual_seed(1))
    with backend("reference"):
        want, dense = ops.linear(x, w), ops.dequantize(w, torch.float32)
    with backend("cpu"):  # raises where there is no kernel
        torch.testing.assert_close(ops.linear(x, w), want, atol=1e-3, rtol=1e-3)
        assert torch.equal(ops.dequantize(w, torch.float32), dense)
        assert torch.equal(ops.embedding(torch.tensor([5, 0]), w, torch.float32), dense[[5, 0]])


def test_its_name_and_its_table_are_taken_once(late: TableFormat) -> None:
    with pytest.raises(ValueError, match="'late3' is already registered"):
        register_format(late)
    with pytest.raises(RuntimeError, match="format 'late3' has a table of 3 bits already"):
        torch.ops.hqqtensor._set_table("late3", 3, late.table)


def test_a_table_that_kernels_refuse_is_not_registered() -> None:
    values = torch.linspace(-1, 1, 3)
    bad = TableFormat("odd", values, Levels.between(values), torch.arange(3, dtype=torch.uint8))
    with pytest.raises(
        RuntimeError, match=r"the table of format 'odd' must be contiguous float32 \[2\], got float32 \[3\]"
    ):
        register_format(bad)
    assert "odd" not in base._FORMATS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_integers_cannot_stand_for_take_the_float_path(value: float) -> None:
    entries = torch.linspace(-1, 1, 16).unsqueeze(0)
    entries[0, -1] = value
    entries[0, 0] = -value if value == 3e38 else -1
    q = HQQTensor.from_hp(torch.randn(8, 64, generator=torch.manual_seed(0)), HqqConfig(4, 64, format="codebook"))
    w, x = q.operand()._replace(zero_point=entries), torch.full((2, 64), 1e-6)
    with backend("reference"):
        want = ops.linear(x, w)
    torch.testing.assert_close(ops.linear(x, w), want, equal_nan=True, rtol=1e-3, atol=1e-8)
