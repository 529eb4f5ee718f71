"""Writes the checkpoints of one format version: ``python write.py v1``, with the code that defines the version.

It leaves folders that are there as they are: those files are what users have, and later code must read them. Each
folder holds a checkpoint and ``expected.safetensors``, the dense values of its weights as that code read them.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, backend, quantize_, save_model
from hqqtensor.serialization.save import save_state

LAYERS = {
    "int4_g64": {"nbits": 4, "group_size": 64},
    "int3_axis0": {"nbits": 3, "group_size": 6, "axis": 0},
    "nested4": {"nbits": 4, "group_size": 16, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    "nested8_axis0": {"nbits": 2, "group_size": 6, "axis": 0, "quant_scale": True, "quant_zero": True},
    "codebook_row": {"nbits": 3, "group_size": 32, "format": "codebook", "codebook": "row"},
    "codebook_tensor": {"nbits": 4, "group_size": 32, "format": "codebook"},
    "nf4_int8_activations": {"nbits": 4, "group_size": 64, "format": "nf4", "activation": "int8"},
    "rotation_column_scaled": {"nbits": 4, "group_size": 32, "solver": "column_scaled", "rotation": True},
    "view_as_float": {"nbits": 4, "group_size": 64, "view_as_float": True},
    "int1": {"nbits": 1, "group_size": 16},
    "fp4": {"nbits": 4, "group_size": 32, "format": "fp4"},
    "fp6_axis0": {"nbits": 6, "group_size": 6, "format": "fp6", "axis": 0},
    "fp8_nested8": {"nbits": 8, "group_size": 32, "format": "fp8", "quant_scale": True},
}


def linears(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(128, 12), nn.Linear(12, 3)).to(dtype)


def quantized(options: dict, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = linears(dtype)
    quantize_(model, HqqConfig(**options), filter_fn=lambda module, name: name == "0")
    return model


def expect(folder: Path, model: nn.Module) -> None:
    state = {name: t.detach() for name, t in model.state_dict().items()}
    dense = {name: t.dequantize() if isinstance(t, HQQTensor) else t for name, t in state.items()}
    save_file({name: t.clone().contiguous() for name, t in dense.items()}, folder / "expected.safetensors")


def main(root: Path) -> None:
    root.mkdir()
    for name, options in LAYERS.items():
        model = quantized(options)
        save_model(model, root / name)
        expect(root / name, model)

    model = quantized({"nbits": 8, "group_size": 64}, torch.bfloat16)
    save_model(model, root / "sharded_bfloat16", max_shard_size="1KB")
    expect(root / "sharded_bfloat16", model)

    torch.manual_seed(2)
    tied = nn.ModuleDict({"embed": nn.Embedding(10, 64), "head": nn.Linear(64, 10, bias=False)})
    tied["head"].weight = tied["embed"].weight
    tied["embed"].register_buffer("steps", torch.arange(3.0), persistent=False)
    quantize_(tied, HqqConfig(5, 32))
    save_model(tied, root / "tied_hidden_buffer")
    expect(root / "tied_hidden_buffer", tied)

    others = nn.ParameterDict()
    others["convolution"] = HQQTensor.from_hp(torch.randn(4, 3, 2, 2), HqqConfig(4, 12), row_dims=3)
    others["experts"] = HQQTensor.from_hp(torch.randn(2, 5, 24), HqqConfig(6, 8))
    others["transposed"] = HQQTensor.from_hp(torch.randn(5, 24), HqqConfig(7, 8, scale_dtype="float32")).t()
    save_model(others, root / "other_shapes")
    expect(root / "other_shapes", others)

    model = quantized(LAYERS["int4_g64"])
    save_state(model.state_dict(), root / "torchao_entries", {}, [], torchao=True)
    expect(root / "torchao_entries", model)

    model = quantized(LAYERS["nested4"])
    (root / "torch_save").mkdir()
    torch.save(model.state_dict(), root / "torch_save" / "state.pt")
    expect(root / "torch_save", model)


if __name__ == "__main__":
    version = Path(__file__).parent / sys.argv[1]
    with backend("dequantize"), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch, "new"))
        for folder in Path(scratch, "new").iterdir():
            if not (version / folder.name).exists():
                shutil.copytree(folder, version / folder.name)
