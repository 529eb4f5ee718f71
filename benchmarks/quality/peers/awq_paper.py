"""AWQ (Lin et al. 2023, arXiv 2306.00978), our own plain reading: a scale for each input, then round to nearest.

Scales are mean |x| to a power found on a grid of 20 by the layer's output error (equation 5); its search for clipped
ranges is left out. Each layer keeps its own scales (16 bits an input), where AWQ folds them into the layer before.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.method import Method, affine_bits, replace
from benchmarks.quality.task import Task, second_moments

GRID = 20


def _round(w: Tensor, nbits: int) -> Tensor:
    groups, last = w.reshape(-1, 64), 2**nbits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / last).clamp_min(1e-9).half().float()
    zero = (-low / scale).round()
    return (((groups / scale + zero).round().clamp(0, last) - zero) * scale).reshape(w.shape)


@torch.no_grad()
def _mean_sizes(task: Task) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def note(_module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        sums[name] = sums.get(name, 0) + args[0].detach().abs().flatten(0, -2).mean(0)

    hooks = [
        task.model.get_submodule(n).register_forward_pre_hook(functools.partial(note, name=n)) for n in task.layers
    ]
    for batch in task.tuning:
        task.model(**batch)
    for hook in hooks:
        hook.remove()
    return sums


def _quantize(model: nn.Module, task: Task, nbits: int) -> float:
    bits = 0.0
    sizes, moments = _mean_sizes(task), second_moments(task.model, task.layers, task.tuning)
    for name in task.layers:
        layer = model.get_submodule(name)
        w, best, error = layer.weight.detach(), None, float("inf")
        for step in range(GRID):
            s = sizes[name].clamp_min(1e-6).pow(step / GRID)
            s = (s / (s.max() * s.min()).sqrt()).half().float()
            got = _round(w * s, nbits) / s
            e = got - w
            now = ((e @ moments[name]) * e).sum().item()
            if now < error:
                best, error = got, now
        assert best is not None
        replace(layer, best)
        bits += affine_bits(w, nbits, 64, metadata=16 + nbits) + 16 * w.shape[1]
    return bits


def methods() -> list[Method]:
    return [Method(f"AWQ {b}-bit g64 (paper)", b, lambda m, t, b=b: _quantize(m, t, b), data="text") for b in (4, 3, 2)]
