"""load_model changes a model wholly or, on an error, not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_, save_model


def layers() -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    model.register_buffer("steps", torch.arange(3.0))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two dense layers, then two quantized ones."""
    model = layers()
    quantize_(model, HqqConfig(4, 64), filter_fn=lambda module, name: name in ("2", "3"))
    model.steps += 10
    save_model(model, tmp_path)
    return tmp_path


class Unchanged:
    """Asserts at the end that a model holds the same tensors, objects and numbers alike."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors = model, self._tensors(model)
        self.numbers = [t.detach().clone() for t in self.tensors]

    @staticmethod
    def _tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        now = self._tensors(self.model)
        assert all(a is b for a, b in zip(self.tensors, now, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(self.numbers, now, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_missing(saved: Path, device: str) -> None:
    model = layers()
    with Unchanged(model), pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        load_model(model, saved, device=device)


def test_a_device_that_does_not_exist(saved: Path) -> None:
    model = layers()
    with Unchanged(model), pytest.raises(RuntimeError, match="nonsense"):
        load_model(model, saved, device="nonsense")


def test_a_device_that_is_full_after_the_first_weight(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = HQQTensor._ATEN_OP_TABLE[HQQTensor][torch.ops.aten._to_copy.default]

    def full(func, types, args, kwargs):
        calls.append(args[0])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("the device is full")
        return real(func, types, args, kwargs)

    monkeypatch.setitem(HQQTensor._ATEN_OP_TABLE[HQQTensor], torch.ops.aten._to_copy.default, full)
    model = layers()
    with Unchanged(model), pytest.raises(torch.OutOfMemoryError):
        load_model(model, saved, device="meta")
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["1.weight", "steps"])
def test_a_tensor_that_cannot_be_written(saved: Path, name: str) -> None:
    """Tensors of inference mode, and those whose elements share memory, cannot be copied into."""
    with torch.inference_mode():
        frozen = torch.zeros(layers().state_dict()[name].shape)
    for tensor in (frozen, torch.zeros(()).expand(frozen.shape)):
        model = layers()
        if name == "steps":
            model.steps = tensor
        else:
            model[1].weight = nn.Parameter(tensor, requires_grad=False)
        with Unchanged(model), pytest.raises(RuntimeError, match=f"{name}: the model's tensor cannot be written"):
            load_model(model, saved)


def test_without_an_error_dense_weights_keep_their_place_and_all_have_the_numbers(saved: Path) -> None:
    model, trained = layers(), layers()
    trained[0].weight.requires_grad_(True)
    where = model[0].weight.data_ptr()
    assert load_model(model, saved) == ([], [])
    assert model[0].weight.data_ptr() == where and model[0].weight.requires_grad
    assert isinstance(model[2].weight, HQQTensor) and torch.equal(model.steps, torch.arange(3.0) + 10)
    load_model(trained, saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
