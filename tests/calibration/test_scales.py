"""``train_scales``: scales and zero points as parameters of any optimizer."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import train_scales
from hqqtensor.ops import pieces, reference, scale_gradients

OPTIONS = [
    {"nbits": 2}, {"nbits": 3, "axis": 0}, {"nbits": 2, "quant_scale": True, "quant_zero": True},
    {"nbits": 2, "format": "codebook", "codebook": "row"}, {"nbits": 4, "format": "nf4"},
    {"nbits": 2, "rotation": True},
]  # fmt: skip


def quantized(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 104), nn.GELU(), nn.Linear(104, 32))
    quantize_(model, HqqConfig(**{"nbits": 2, "group_size": 32, **options}))
    return model


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_dense_weight(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w = quantized(**options)[0].weight.detach()
    x, up = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 104)
    act = torch.rand(64) + 0.5
    stored = [t for t in (w.scale, w.zero_point) if t is not None]
    numbers = [t.dequantize() if isinstance(t, HQQTensor) else t.float() for t in stored]
    leaves = [t.clone().requires_grad_() for t in numbers]
    zero = leaves[1] if len(leaves) > 1 else None
    dense = reference.dequantize(w.operand()._replace(scale=leaves[0], zero_point=zero, meta=None), torch.float32)
    want = torch.autograd.grad((x * act) @ dense.t(), [x, *leaves], up)
    for size in (pieces.PIECE_BYTES, 64 * 4 * 7):  # in one piece, and seven rows at a time
        monkeypatch.setattr(scale_gradients, "PIECE_BYTES", size)
        out = scale_gradients.trained_linear(x, w.operand(), leaves[0], zero, None, act)
        assert torch.allclose(out, (x * act) @ dense.t(), atol=1e-4)
        for got, grad in zip(torch.autograd.grad(out, [x, *leaves], up), want, strict=True):
            assert torch.allclose(got, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_any_optimizer_trains_them_and_they_are_stored_as_they_were(options: dict[str, Any]) -> None:
    model = quantized(**options)
    old = {name: p.detach() for name, p in model.named_parameters() if isinstance(p, HQQTensor)}
    x, want = torch.randn(64, 64), torch.randn(64, 32)

    def loss() -> torch.Tensor:
        return (model(x) - want).square().mean()

    before = loss().item()
    model.requires_grad_(False)
    with train_scales(model) as scales:
        assert scales.names == ["0", "2"] and scales.left == []
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in scales.parameters()}
        assert loss().item() == pytest.approx(before, rel=1e-3)
        optimizer = torch.optim.Adam(trained, 1e-2)
        for _ in range(20):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        after = loss().item()
        seen = model[0].weight.dequantize()
    assert after < 0.98 * before and loss().item() == pytest.approx(after, rel=0.05)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, weight in old.items():
        new = model.get_parameter(name)
        assert torch.equal(new.qdata, weight.qdata) and new.describe() == weight.describe()
        assert new.nbytes == weight.nbytes and not torch.equal(new, weight)
    dense = model[0].weight.dequantize()
    assert (dense - seen).square().mean() < 0.1 * (dense - old["0.weight"].dequantize()).square().mean()


def test_an_error_puts_the_old_numbers_back() -> None:
    model = quantized()
    old = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), train_scales(model) as scales:
        scales.parameters()[0].data.fill_(0.5)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="cannot hold"), train_scales(model) as scales:
        scales.parameters()[0].data.fill_(1e9)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())
    with pytest.raises(RuntimeError, match="has ended"):
        scales.store()


def test_modules_are_chosen_and_what_has_none_is_refused() -> None:
    model = quantized()
    with train_scales(model, lambda module, name: name == "2") as scales:
        assert scales.names == ["2"] and scales.left == ["0.weight"]
        with pytest.raises(ValueError, match="2: its scales are trained already"):
            train_scales(model)
    with pytest.raises(ValueError, match="no quantized nn"):
        train_scales(model, lambda module, name: False)
