"""Gradients to the inputs of weights so large that only a piece of the dense weight exists at a time."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.ops import pieces


@pytest.mark.parametrize("settings", [{}, {"axis": 0}, {"quant_scale": True, "quant_zero": True}, {"format": "nf4"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_rows_give_the_gradient_of_the_whole(settings: Any, dtype: torch.dtype, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    w = HQQTensor.from_hp(torch.randn(200, 128), HqqConfig(4, 64, **settings))
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 200, dtype=dtype)
    (want,) = torch.autograd.grad(F.linear(x, w), x, grad)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 128 * dtype.itemsize * 33)
    (got,) = torch.autograd.grad(F.linear(x, w), x, grad)
    limit = 1e-5 if dtype == torch.float32 else 0.01
    assert got.dtype == dtype and (got - want).abs().max() < limit * want.abs().max()


def test_experts_are_dequantized_in_pieces(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    w = HQQTensor.from_hp(torch.randn(4, 96, 64), HqqConfig(4, 32))
    x = torch.randn(10, 64, requires_grad=True)
    offsets = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    grad, dense = torch.randn(10, 96), w.dequantize()
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64 * 4 * 40)
    (got,) = torch.autograd.grad(torch._grouped_mm(x, w.transpose(-1, -2), offsets), x, grad)
    want = torch.cat([grad[:3] @ dense[0], grad[3:8] @ dense[2], grad[8:9] @ dense[3], torch.zeros(1, 64)])
    assert torch.allclose(got, want, atol=1e-4)
    x = torch.randn(4, 5, 64, requires_grad=True)
    grad = torch.randn(4, 5, 96)
    (got,) = torch.autograd.grad(torch.bmm(x, w.transpose(-1, -2)), x, grad)
    assert torch.allclose(got, torch.bmm(grad, dense), atol=1e-4)
