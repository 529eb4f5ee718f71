"""The reader of docs/examples, written after docs/format.md with numpy alone, reads what we do, to the last bit."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, backend, save_model

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests" / "assets" / "checkpoints"
VECTORS = [path for path in sorted(ASSETS.glob("v*/*")) if path.name != "torch_save"]  # which is a pickle
NESTED = {"quant_scale": True, "quant_zero": True}
SETTINGS: list[dict[str, Any]] = [
    *({"nbits": nbits, "group_size": 24, "axis": axis} for nbits in range(1, 9) for axis in (0, 1)),
    *({"nbits": nbits, "group_size": 12, "axis": axis, "meta_nbits": meta, **NESTED}
      for nbits, axis, meta in ((3, 0, 4), (4, 1, 4), (5, 0, 8), (6, 1, 8))),
    *({"nbits": nbits, "format": name, "group_size": 24, "axis": axis}
      for nbits, name in ((4, "nf4"), (4, "fp4"), (6, "fp6"), (8, "fp8")) for axis in (0, 1)),
    {"nbits": 4, "format": "nf4", "group_size": 24, "quant_scale": True, "meta_nbits": 4},
    *({"nbits": nbits, "format": "codebook", "group_size": 24, "codebook": kind}
      for nbits in (1, 2, 3, 4) for kind in ("tensor", "row")),
    {"nbits": 2, "format": "codebook", "group_size": 6, "axis": 0},
    {"nbits": 4, "group_size": 24, "rotation": True},
    {"nbits": 4, "group_size": 24, "solver": "column_scaled", "rotation": True},
    {"nbits": 3, "group_size": 24, "scale_dtype": "bfloat16"},
    {"nbits": 4, "group_size": 24, "view_as_float": True},
]  # fmt: skip


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
    torch.manual_seed(0)
    weights = nn.ParameterDict()
    for place, settings in enumerate(SETTINGS):
        for columns in (200, 136):  # a whole block of 128 codes, and a short one; 136 is no multiple of 24
            q = HQQTensor.from_hp(torch.randn(50, columns).to(dtype), HqqConfig(**settings))
            weights[f"w{place}_{columns}"] = nn.Parameter(q, requires_grad=False)
    weights["odd"] = nn.Parameter(HQQTensor.from_hp(torch.randn(7, 13).to(dtype), HqqConfig(3, 5, **NESTED)), False)
    weights["rows"] = nn.Parameter(
        HQQTensor.from_hp(torch.randn(50, 9).to(dtype), HqqConfig(4, 6, axis=0))[5:20], False
    )
    weights["dense"] = nn.Parameter(torch.randn(5).to(dtype))
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
