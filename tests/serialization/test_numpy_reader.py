"""The reader of docs/examples, written after docs/format.md with numpy alone, reads what we do, to the last bit."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from every_setting import VECTORS, weights_of_every_setting
from safetensors.torch import load_file

from hqqtensor import HQQTensor, backend, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_numpy", ROOT / "docs" / "examples" / "read_numpy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(array: np.ndarray, want: torch.Tensor) -> bool:
    """numpy has no bfloat16: there the reader gives the same numbers as float32."""
    got = torch.from_numpy(np.array(array))
    return torch.equal(got.to(want.dtype) if want.dtype == torch.bfloat16 else got, want)


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_reads_the_test_vectors(reader: ModuleType, folder: Path) -> None:
    arrays = reader.read(folder)
    for name, want in load_file(folder / "expected.safetensors").items():
        assert same(arrays[name], want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_reads_every_width_format_axis_and_quantized_metadata(
    reader: ModuleType, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = weights_of_every_setting(dtype)
    save_model(weights, tmp_path)
    arrays = reader.read(tmp_path)
    assert set(weights.keys()) <= set(arrays)
    with backend("dequantize"):
        for name, tensor in weights.items():
            want = tensor.dequantize() if isinstance(tensor, HQQTensor) else tensor.detach()
            assert same(arrays[name], want), f"{name} {tensor!r}"


def test_it_refuses_a_later_version(reader: ModuleType, tmp_path: Path) -> None:
    raw = (VECTORS[0] / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw.replace(rb"\"version\": 1", rb"\"version\": 2"))
    with pytest.raises(ValueError, match="version 2"):
        reader.read(path)
