"""Dense half-precision products in float32, on processors that have no instructions for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hqqtensor import HqqConfig, half_products, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.half_products import fast_half_products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "_slow_dtypes", lambda: frozenset(HALVES))


class Products(TorchFunctionMode):
    """Notes the dtypes of the products that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in half_products._PRODUCTS:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def dtypes_of(product: Callable[[], Tensor]) -> tuple[Tensor, list[torch.dtype]]:
    with Products() as products, fast_half_products():
        out = product()
    return out, products.dtypes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("slow_processor")
def test_products_are_computed_in_float32_and_rounded(dtype: torch.dtype) -> None:
    x, w, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 40, 24), (16, 24), (16,)))
    q = torch.randn(2, 3, 40, 24).to(dtype)
    wide = [t.float() for t in (x, w, bias, q)]
    cases = [
        (lambda: F.linear(x, w, bias), F.linear(*wide[:3])),
        (lambda: F.linear(x, weight=w, bias=bias), F.linear(*wide[:3])),
        (lambda: torch.addmm(bias, x[0], w.T), F.linear(wide[0][0], *wide[1:3])),
        (lambda: x @ w.T, wide[0] @ wide[1].T),
        (lambda: q @ q.transpose(-1, -2), wide[3] @ wide[3].transpose(-1, -2)),
        (lambda: torch.bmm(x, x.mT), torch.bmm(wide[0], wide[0].mT)),
    ]
    for product, expected in cases:
        out, dtypes = dtypes_of(product)
        assert dtypes == [torch.float32]
        torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.usefixtures("slow_processor")
def test_few_rows_other_dtypes_and_quantized_weights_are_left_alone() -> None:
    w = torch.randn(16, 24)
    layer = nn.Sequential(nn.Linear(64, 8, bias=False)).bfloat16()
    quantize_(layer, HqqConfig(4, 64))
    x = torch.randn(40, 64).bfloat16()
    cases: list[tuple[Callable[[], Tensor], torch.dtype]] = [
        (lambda: F.linear(torch.randn(8, 24).bfloat16(), w.bfloat16()), torch.bfloat16),
        (lambda: torch.matmul(torch.randn(64, 1, 24).bfloat16(), torch.randn(64, 24, 40).bfloat16()), torch.bfloat16),
        (lambda: torch.randn(24).bfloat16() @ torch.randn(24, 40).bfloat16(), torch.bfloat16),
        (lambda: F.linear(torch.randn(40, 24), w), torch.float32),
        (lambda: F.linear(torch.randn(40, 24).double(), w.double()), torch.float64),
        (lambda: layer(x), torch.bfloat16),
    ]
    for product, dtype in cases:
        assert dtypes_of(product)[1] == [dtype]


@pytest.mark.usefixtures("slow_processor")
def test_gradients_pass_through() -> None:
    x = torch.randn(40, 24).bfloat16()
    w = nn.Parameter(torch.randn(16, 24).bfloat16())
    _, dtypes = dtypes_of(lambda: F.linear(x, w).float().sum())
    with fast_half_products():
        F.linear(x, w).float().sum().backward()
    assert dtypes == [torch.float32]
    assert w.grad is not None
    torch.testing.assert_close(w.grad.float(), x.float().sum(0).expand(16, -1), rtol=2**-7, atol=0.1)


def test_nothing_changes_on_a_processor_that_has_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "_slow_dtypes", lambda: frozenset())
    assert dtypes_of(lambda: F.linear(torch.randn(40, 24).bfloat16(), torch.randn(16, 24).bfloat16()))[1] == [
        torch.bfloat16
    ]


@pytest.mark.usefixtures("slow_processor")
def test_calibration_uses_it() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
    with Products() as products:
        calibrate(model, [torch.randn(64, 64).bfloat16()], mode="diagonal")
    assert products.dtypes == [torch.float32, torch.float32]
