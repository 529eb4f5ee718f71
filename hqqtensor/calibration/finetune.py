"""Short fine-tuning of scales and zero points against the dense model's outputs; codes stay as they are.

HQQ+ (Badri and Shaji 2024, "Towards 1-bit Machine Learning Models") trains low-rank adapters and scales after
quantization; here are no adapters, so a layer costs the same afterwards. The loss is the KL divergence of the
next-token distributions (the relative squared error of hidden states where there are no logits).
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.encode import store
from hqqtensor.forward import comparable_output, evaluating
from hqqtensor.ops import reference
from hqqtensor.parameters import replace_parameters
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import to_inputs


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


class _Product(torch.autograd.Function):
    """``x [..., K]`` times the transpose of the dense weight of given scales and zero points, with gradients to all.

    The backward pass dequantizes again, so that the dense weight of only one layer is in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, weight: HQQTensor) -> Tensor:
        ctx.save_for_backward(x, scale, *([] if zero is None else [zero]))
        ctx.weight = weight
        return x @ _dense(weight, scale, zero).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *numbers = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in numbers]
            w = _dense(ctx.weight, leaves[0], leaves[1] if len(leaves) > 1 else None)
        grad_x = grad @ w.detach() if ctx.needs_input_grad[0] else None
        grads = torch.autograd.grad(w, leaves, grad.flatten(0, -2).t() @ x.flatten(0, -2))
        return grad_x, grads[0], grads[1] if len(grads) > 1 else None, None


def _dense(weight: HQQTensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Float32 ``[N, K]`` as stored: not yet divided by act_pre_scale or rotated back."""
    packed = weight.operand()._replace(scale=scale, zero_point=zero, meta=None)
    return reference.dequantize(packed, torch.float32)


class _Tuned:
    """A weight with its scale times 1 + a and its zero point plus b; ``trained`` has a, and b where it may change."""

    def __init__(self, weight: HQQTensor) -> None:
        self.weight, self.zero = weight, None
        self.scale = _plain(weight.scale)
        self.a = torch.zeros_like(self.scale, requires_grad=True)
        self.trained = [self.a]
        if weight.zero_point is not None:
            self.zero = _plain(weight.zero_point)
            self.b = torch.zeros_like(self.zero, requires_grad=True)
            # Integer zero points stay integers.
            if weight.format != "int" or not torch.equal(self.zero, self.zero.round()):
                self.trained.append(self.b)

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as trained so far, float32."""
        return self.scale * (1 + self.a), None if self.zero is None else self.zero + self.b

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x32 = x.to(torch.float32)
        if self.weight.rotation:
            x32 = to_inputs(x32, self.weight.act_pre_scale, self.weight.rotation)
        elif self.weight.act_pre_scale is not None:
            x32 = x32 * self.weight.act_pre_scale.to(torch.float32)
        out = _Product.apply(x32, *self.numbers(), self.weight)
        return (out if bias is None else out + bias).to(x.dtype)

    @torch.no_grad()
    def stored(self) -> HQQTensor:
        """The weight with scale and zero point as trained so far, in the dtype or bits that it stores them in."""
        scale, zero = self.numbers()
        changes = {"scale": _like(scale, self.weight.scale, "scale")}
        if zero is not None:
            assert self.weight.zero_point is not None
            if self.weight.format == "codebook":
                zero = zero.cummax(-1).values  # entries ascend
            changes["zero_point"] = _like(zero, self.weight.zero_point, "zero_point")
        return self.weight.with_data(**changes)


def _plain(values: Tensor) -> Tensor:
    """Scales or zero points in float32, read through their own scales where they are quantized."""
    return (values.dequantize() if isinstance(values, HQQTensor) else values).detach().to(torch.float32)


def _like(values: Tensor, old: Tensor, name: str) -> Tensor:
    """``values`` stored in the dtype or bits of ``old``."""
    stored, _ = store(values, old.dtype, old.nbits if isinstance(old, HQQTensor) else None, name)
    return stored if isinstance(stored, Tensor) else HQQTensor.meta_from_encoded(stored)


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
    twice, one dense weight, 16 bytes for each scale and zero point. ValueError for no batches, steps below 1, lr not
    over 0, nothing to tune, or outputs of different shapes.
    """
    batches = list(batches)
    if not batches or steps < 1 or not lr > 0:
        raise ValueError(f"finetune needs batches, steps >= 1 and lr > 0; got {len(batches)} batches, {steps}, {lr}")
    tuned: dict[int, _Tuned] = {}
    users: dict[str, _Tuned] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and isinstance(weight, HQQTensor) and weight.ndim == 2:
            users[name] = tuned.setdefault(id(weight), _Tuned(weight.detach()))  # type: ignore[arg-type]
    if not users:
        raise ValueError("nothing to tune: the model has no quantized nn.Linear; call quantize_ first")
    left = [n for n, p in model.named_parameters() if isinstance(p, HQQTensor) and id(p) not in tuned]
    with evaluating(model), evaluating(dense):
        before = _mean_loss(model, dense, batches)
        is_trained = _train(model, dense, batches, users, list(tuned.values()), steps, lr, seed, progress)
        new_by_id = {old_id: nn.Parameter(t.stored(), requires_grad=False) for old_id, t in tuned.items()}
        old_by_id = {id(new_by_id[id(p)]): p for p in model.parameters() if id(p) in new_by_id}
        replace_parameters(model, new_by_id)
        after = math.inf
        try:
            after = _mean_loss(model, dense, batches) if is_trained else math.inf
        finally:
            if not after < before:
                replace_parameters(model, old_by_id)
    return Finetuned(before, after, after < before, list(users), left)


def _train(
    model: nn.Module, dense: nn.Module, batches: list[Any], users: dict[str, _Tuned], tuned: list[_Tuned], steps: int,
    lr: float, seed: int, progress: Callable[[int, int, str], None] | None,
) -> bool:  # fmt: skip
    """Train; False where the loss stopped being a number."""
    parameters = [p for t in tuned for p in t.trained]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(seed), []  # type: ignore[var-annotated]
    modules = {name: model.get_submodule(name) for name in users}
    instance_forward = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = functools.partial(_forward, users[name], module)  # type: ignore[method-assign]
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
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if instance_forward[name] is not None:
                module.forward = instance_forward[name]  # type: ignore[method-assign, assignment]
    return True


def _forward(tuned: _Tuned, module: nn.Module, input: Tensor) -> Tensor:
    """``module(input)`` with the scales and zero points in training; input has the name of nn.Linear's argument."""
    return tuned.linear(input, module.bias)  # type: ignore[arg-type]


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
