"""Short fine-tuning of scales and zero points against the dense model's outputs; codes stay as they are.

HQQ+ (Badri and Shaji 2024, "Towards 1-bit Machine Learning Models") trains low-rank adapters and scales after
quantization; here are no adapters, so a layer costs the same afterwards. The loss is the KL divergence of the
next-token distributions (the relative squared error of hidden states where there are no logits).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.calibration.scales import train_scales
from hqqtensor.forward import comparable_output, evaluating
from hqqtensor.half_products import fast_half_products
from hqqtensor.parameters import replace_parameters


@dataclass(frozen=True)
class Finetuned:
    """What ``finetune`` did.

    before, after: mean loss over the batches; after, with scales and zero points rounded as they are stored.
    kept: whether the tuned ones are in the model; otherwise the loss did not fall and the model is as it was.
    tuned: names of the layers tuned. left: quantized parameters that were not, such as experts and embeddings.
    """

    before: float
    after: float
    kept: bool
    tuned: list[str]
    left: list[str]


def finetune(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    steps: int = 100,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Finetuned:
    """Train the scales and zero points (or learned entries) of ``model``'s quantized linear layers, in place.

    dense: the same model before it was quantized. batches: what both are called with, as for ``calibrate``, on their
        device; rows with ``attention_mask`` 0 do not count. All are in memory, and are used in random order.
    steps: batches trained on. lr: Adam's step, of scales relative to them, of zero points in codes; it falls to 0.
    progress: called as ``progress(done, total, "loss 0.123")`` after each step.

    At the end scales and zero points are rounded as they are stored. Where the loss over the batches has not fallen by
    then, and after an error, the model is left as it was. Memory: activations of one batch with gradients, its outputs
    twice, 32 MiB of dense weights, 40 bytes for each scale and zero point. ValueError for no batches, steps below 1, lr
    not over 0, nothing to train, or outputs of different shapes.
    """
    batches = list(batches)
    if not batches or steps < 1 or not lr > 0:
        raise ValueError(f"finetune needs batches, steps >= 1 and lr > 0; got {len(batches)} batches, {steps}, {lr}")
    with evaluating(model), evaluating(dense), fast_half_products():
        before = _mean_loss(model, dense, batches)
        old_by_name = dict(model.named_parameters())
        with train_scales(model) as scales:
            is_trained = _train(model, dense, batches, scales.parameters(), steps, lr, seed, progress)
            if not is_trained:
                scales.restore()
        old_by_id = {id(p): old_by_name[name] for name, p in model.named_parameters() if p is not old_by_name[name]}
        after = math.inf
        try:
            after = _mean_loss(model, dense, batches) if is_trained else math.inf
        finally:
            if not after < before:
                replace_parameters(model, old_by_id)
    return Finetuned(before, after, after < before, scales.names, scales.left)


def _train(
    model: nn.Module, dense: nn.Module, batches: list[Any], parameters: list[nn.Parameter], steps: int, lr: float,
    seed: int, progress: Callable[[int, int, str], None] | None,
) -> bool:  # fmt: skip
    """Train; False where the loss stopped being a number."""
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(seed), []  # type: ignore[var-annotated]
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        with torch.no_grad():
            want = comparable_output(dense, batch)
        with torch.enable_grad():
            loss = _loss(comparable_output(model, batch), want, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not bool(loss.isfinite()):
            return False
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, f"loss {loss.item():.4g}")
    return True


def _loss(got: tuple[Tensor, bool], want: tuple[Tensor, bool], batch: Any) -> Tensor:
    """Mean KL(want || got) of the tokens' logits, or the relative squared error of hidden states."""
    (q, logits), (p, _) = got, want
    if q.shape != p.shape:
        raise ValueError(f"outputs of shape {list(q.shape)} do not fit the dense model's {list(p.shape)}")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == q.shape[:-1]:
        q, p = q[mask.bool()], p[mask.bool()]
    if logits:
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True) / max(1, p[..., 0].numel())
    return (q - p).square().sum() / p.square().sum().clamp_min(1e-30)


@torch.no_grad()
def _mean_loss(model: nn.Module, dense: nn.Module, batches: list[Any]) -> float:
    losses = (_loss(comparable_output(model, b), comparable_output(dense, b), b).item() for b in batches)
    return sum(losses) / len(batches)
