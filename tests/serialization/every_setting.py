"""What readers of the format are tried on: the test vectors, and weights of all widths, formats, axes and scales."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor

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


def weights_of_every_setting(dtype: torch.dtype) -> nn.ParameterDict:
    """Weights of about 50 rows that differ in every setting that the format stores, and one dense tensor."""
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
    return weights
