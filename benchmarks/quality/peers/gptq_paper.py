"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), our own plain reading: groups of 64, min-max grids, no reordering.

Block by block of the model, as in the authors' code: inputs come from the blocks already quantized. Damping 1 %
(the paper's default); scale in 16 bits and zero point of as many bits as a code.
"""

import torch
from torch import Tensor, nn

from benchmarks.quality.method import Method, affine_bits, replace
from benchmarks.quality.task import Task, second_moments

DAMPING = 0.01


def blocks_of(layers: list[str]) -> list[list[str]]:
    """Layer names by the numbered block that holds them, in order."""
    found: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        end = next(i for i, part in enumerate(parts) if part.isdigit())
        found.setdefault(".".join(parts[: end + 1]), []).append(name)
    return list(found.values())


def _solve(w: Tensor, moments: Tensor, nbits: int, group_size: int) -> Tensor:
    w, h, last = w.clone(), moments.clone(), 2**nbits - 1
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.empty_like(w)
    for k in range(w.shape[1]):
        if k % group_size == 0:
            group = w[:, k : k + group_size]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scale = ((high - low) / last).clamp_min(1e-9).half().float()
            zero = (-low / scale).round()
        out[:, k] = ((w[:, k] / scale + zero).round().clamp(0, last) - zero) * scale
        error = (w[:, k] - out[:, k]) / upper[k, k]
        w[:, k + 1 :] -= error.unsqueeze(1) * upper[k, k + 1 :]
    return out


def _quantize(model: nn.Module, task: Task, nbits: int) -> float:
    bits = 0.0
    for names in blocks_of(task.layers):
        moments = second_moments(model, names, task.tuning)
        for name in names:
            layer = model.get_submodule(name)
            weight = layer.weight.detach()
            replace(layer, _solve(weight, moments[name], nbits, 64))
            bits += affine_bits(weight, nbits, 64, metadata=16 + nbits)
    return bits


def methods() -> list[Method]:
    return [
        Method(f"GPTQ {b}-bit g64 (paper)", b, lambda m, t, b=b: _quantize(m, t, b), data="text") for b in (4, 3, 2)
    ]
