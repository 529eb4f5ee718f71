"""SmolLM2 in the formats of quantized methods that vLLM offers, rounded to the nearest: for speed, not for quality."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _packed(codes: Tensor, order: list[int]) -> Tensor:
    """4-bit codes ``[..., 8 * n]`` as int32 ``[..., n]``; ``order[i]`` is the code in nibble i."""
    words = codes.unflatten(-1, (-1, 8)).to(torch.int64)
    word = torch.zeros(words.shape[:-1], dtype=torch.int64)
    for nibble, place in enumerate(order):
        word |= words[..., place] << (4 * nibble)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` from -8 to 7 and scales ``[N, K / GROUP]``."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp_min(1e-8) / 7
    return (groups / scale[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int8), scale


def _gptq(name: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale = _grouped(weight)
    rows, columns = weight.shape
    qweight = _packed((codes + 8), list(range(8))).t().contiguous()
    zeros = _packed(torch.full((columns // GROUP, rows), 7), list(range(8)))  # the format stores one less
    g_idx = (torch.arange(columns) // GROUP).int()
    parts = {"qweight": qweight, "qzeros": zeros, "scales": scale.t().contiguous().half(), "g_idx": g_idx}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _awq(name: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale = _grouped(weight)
    rows, columns = weight.shape
    qweight = _packed((codes + 8).t().contiguous(), AWQ_ORDER)
    zeros = _packed(torch.full((columns // GROUP, rows), 8), AWQ_ORDER)
    parts = {"qweight": qweight, "qzeros": zeros, "scales": scale.t().contiguous().half()}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return {f"{name}.weight": (weight.float() / scale).round().to(torch.int8), f"{name}.weight_scale": scale}


def _int4(name: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale = _grouped(weight)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def _compressed(weights: dict[str, Any]) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    activations = {"num_bits": 8, **common, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, **weights, "dynamic": False},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


METHODS: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "W8A8": (_int8, _compressed({"num_bits": 8, "strategy": "channel"})),
    "W4A8": (_int4, _compressed({"num_bits": 4, "strategy": "group", "group_size": GROUP})),
}
"""By name, how a weight is stored and config.json's ``quantization_config``."""


def write(name: str, dense: Path, out: Path) -> Path:
    """Write the dense directory ``dense`` in the format ``name`` of METHODS to ``out``."""
    store, entry = METHODS[name]
    out.mkdir(parents=True)
    for file in dense.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    state: dict[str, Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            layer, _, leaf = key.rpartition(".")
            packs = leaf == "weight" and layer.rpartition(".")[2] in LAYERS
            state |= store(layer, tensor) if packs else {key: tensor}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": entry}, indent=2))
    return out
