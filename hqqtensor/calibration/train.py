"""Learned rounding: which way each weight of a block is rounded, trained towards what the dense block gives.

AutoRound (Cheng et al. 2023, arXiv 2309.05516) moves every weight by up to half a code before it is rounded, and
learns the moves of a block's layers together by signed gradient descent on the squared error of the block's output.
Here the block is given what the quantized blocks before it give, and the target is what the dense block gives of the
dense model's hidden states. Scales and zero points stay, so a layer's size and speed stay.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.ops.reference import expand_groups, plain_meta
from hqqtensor.packing import pack, unpack
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import to_inputs

STEPS = 60
REACH = 0.25
"""Codes by which a weight may move in all."""
EDGE = 0.49
"""How far from its code a weight may lie at first, in codes: weights beyond the range are farther."""


class Rounding:
    """A quantized weight whose codes change. ``place``: where its weights lie, in codes, before they are rounded."""

    def __init__(self, module: nn.Module, above: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, HQQTensor)
        self.module, self.weight = module, weight
        w = weight.operand()
        n, k = weight.shape
        scale, zero = plain_meta(w)
        assert zero is not None
        self.scale, self.zero = (expand_groups(t, n, k, w.group_size, w.axis) for t in (scale, zero))
        self.last = 2**w.nbits - 1
        codes = unpack(w.qdata, w.nbits, k).to(torch.float32)
        self.place = codes.add_(above.clamp(-EDGE, EDGE))
        self.leaf = torch.empty(0)

    def codes(self) -> Tensor:
        return self.place.round().clamp_(0, self.last)

    def take(self, dtype: torch.dtype) -> None:
        """Give the module the dense weight of the codes as they are now; ``leaf`` collects its gradient."""
        self.leaf = ((self.codes() - self.zero) * self.scale).requires_grad_()
        self.module._parameters["weight"] = self.leaf.to(dtype)  # type: ignore[assignment]

    def move(self, gradient: Tensor, step: float) -> None:
        """Move every weight by ``step`` codes against the sign of its gradient."""
        self.place.sub_(gradient.sign_(), alpha=step)

    def stored(self) -> HQQTensor:
        """The weight with the codes as they are now."""
        return self.weight.with_data(qdata=pack(self.codes().to(torch.uint8), self.weight.nbits))


def _on_inputs(_module: nn.Module, args: tuple[Any, ...], *, weight: HQQTensor) -> tuple[Any, ...]:
    """The layer's input as its stored weight takes it."""
    x, act = args[0], weight.act_pre_scale
    assert act is not None
    return (to_inputs(x, act, weight.rotation) if weight.rotation else x * act.to(x.dtype), *args[1:])


def train_rounding(
    roundings: Sequence[Rounding], run: Callable[[int], Tensor], targets: Sequence[Tensor],
    masks: Sequence[Tensor | None], steps: int = STEPS, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Train the codes of a block's layers; the mean squared errors of its outputs before and after.

    run(i): what the block gives for batch ``i``, with gradients. targets: what it is to give. masks: tokens that count.
    Where the error over all batches has not fallen, the weights are as they were.
    """
    before = _error(run, targets, masks)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    dtype = targets[0].dtype
    weights = [r.module._parameters["weight"] for r in roundings]
    try:
        with contextlib.ExitStack() as stack:
            for r in roundings:
                if r.weight.act_pre_scale is not None:
                    hook = functools.partial(_on_inputs, weight=r.weight)
                    stack.callback(r.module.register_forward_pre_hook(hook).remove)
            for step in range(steps):
                order = order or torch.randperm(len(targets), generator=generator).tolist()
                i = order.pop()
                with torch.enable_grad():
                    for r in roundings:
                        r.take(dtype)
                    loss = _squared(run(i), targets[i], masks[i])
                    gradients = torch.autograd.grad(loss, [r.leaf for r in roundings])
                size = 2 * REACH / steps * (1 - step / steps)
                for r, gradient in zip(roundings, gradients, strict=True):
                    r.move(gradient, size)
        for r in roundings:
            r.module._parameters["weight"] = nn.Parameter(r.stored(), requires_grad=False)
        after = _error(run, targets, masks)
    except BaseException:
        after = float("inf")
        raise
    finally:
        if not after < before:
            for r, weight in zip(roundings, weights, strict=True):
                r.module._parameters["weight"] = weight
    return before, after


def _squared(got: Tensor, want: Tensor, mask: Tensor | None) -> Tensor:
    difference = got.to(torch.float32) - want.to(torch.float32)
    if mask is not None and mask.shape == difference.shape[:-1]:
        difference = difference[mask]
    return difference.square().mean()


def _error(run: Callable[[int], Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> float:
    with torch.no_grad():
        return sum(_squared(run(i), want, masks[i]).item() for i, want in enumerate(targets)) / len(targets)
