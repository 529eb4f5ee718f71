"""Checkpoints of earlier versions, in tests/assets/checkpoints, are read to the last bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hqqtensor import HQQTensor, backend, load_model
from hqqtensor.serialization import inspect_checkpoint
from hqqtensor.serialization.load import read_checkpoint

ASSETS = Path(__file__).parent.parent / "assets" / "checkpoints"
SAVED = sorted(path for path in ASSETS.glob("v*/*") if path.is_dir())
FILES = [path for path in SAVED if path.name != "torch_save"]
SETTINGS = {
    "int4_g64": {"nbits": 4, "group_size": 64, "axis": 1, "format": "int"},
    "int3_axis0": {"nbits": 3, "group_size": 6, "axis": 0},
    "nested4": {"nbits": 4, "nested": True},
    "nested8_axis0": {"nbits": 2, "axis": 0, "nested": True},
    "codebook_row": {"nbits": 3, "format": "codebook", "codebook": "row"},
    "codebook_tensor": {"nbits": 4, "format": "codebook", "codebook": "tensor"},
    "nf4_int8_activations": {"format": "nf4", "activation": "int8"},
    "rotation_column_scaled": {"rotation": 128},
    "int1": {"nbits": 1},
    "fp4": {"format": "fp4"},
    "fp6_axis0": {"format": "fp6", "axis": 0},
    "fp8_nested8": {"format": "fp8", "nested": True},
}


@pytest.fixture(autouse=True)
def plain_path():
    """The files' expected values were computed by the reference, whose results do not depend on the machine."""
    with backend("dequantize"):
        yield


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, HQQTensor) else tensor


def empty(expected: dict[str, torch.Tensor]) -> nn.Module:
    """A model on the meta device with parameters of these names and shapes."""
    model = nn.Module()
    for name, tensor in expected.items():
        module = model
        *parts, leaf = name.split(".")
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(tensor.to("meta"), requires_grad=False))
    return model


def test_every_kind_of_checkpoint_is_there() -> None:
    assert len([path for path in SAVED if path.parent.name == "v1"]) == 18


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_saved_model_is_read_to_the_last_bit(path: Path) -> None:
    expected = load_file(path / "expected.safetensors")
    model = empty(expected)
    assert load_model(model, path) == ([], [])
    state = model.state_dict()
    for name, want in expected.items():
        got = dense(state[name])
        assert got.dtype == want.dtype and torch.equal(got, want), name
    assert any(isinstance(t, HQQTensor) for t in state.values())
    for name, value in SETTINGS.get(path.name, {}).items():
        assert getattr(state["0.weight"], name) == value, name
    assert sum(info.kind == "hqq" for info in inspect_checkpoint(path).tensors) >= 1


@pytest.mark.parametrize("path", [path for path in SAVED if path.name == "torch_save"], ids=str)
def test_a_pickled_state_is_read_to_the_last_bit(path: Path) -> None:
    expected = load_file(path / "expected.safetensors")
    state = torch.load(path / "state.pt", weights_only=True)
    assert state.keys() == expected.keys() and isinstance(state["0.weight"].scale, HQQTensor)
    for name, want in expected.items():
        assert torch.equal(dense(state[name]), want), name


def test_aliases_and_hidden_buffers_are_read() -> None:
    state, aliases, hidden = read_checkpoint(ASSETS / "v1" / "tied_hidden_buffer")
    assert aliases == {"head.weight": "embed.weight"} and hidden == {"embed.steps"}
    assert torch.equal(state["embed.steps"], torch.arange(3.0))
