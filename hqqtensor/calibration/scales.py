"""Scales and zero points of quantized linear layers as parameters that any optimizer trains; codes stay as they are."""

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.encode import store
from hqqtensor.ops.scale_gradients import trained_linear
from hqqtensor.parameters import replace_parameters
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.products import inputs_of

PARAMETERS = ("scale_change", "zero_change")
"""Names of the parameters that a module has while its numbers are trained."""


class _Numbers:
    """The scale and zero point of a weight: the stored scale times 1 + a, the stored zero point plus b.

    live: the weight with plain float32 numbers as they were at the last product; it is in the model meanwhile.
    """

    def __init__(self, weight: HQQTensor) -> None:
        self.weight, self.zero = weight, None
        self.scale = _plain(weight.scale)
        self.a = nn.Parameter(torch.zeros_like(self.scale))
        self.trained = [self.a]
        if weight.zero_point is not None:
            self.zero = _plain(weight.zero_point)
            self.b = nn.Parameter(torch.zeros_like(self.zero))
            # Integer zero points stay integers.
            if weight.format != "int" or not torch.equal(self.zero, self.zero.round()):
                self.trained.append(self.b)
        zero = None if self.zero is None else self.zero.clone()
        self.live: Any = nn.Parameter(weight.with_data(scale=self.scale.clone(), zero_point=zero), requires_grad=False)

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as trained so far, float32."""
        return self.scale * (1 + self.a), None if self.zero is None else self.zero + self.b

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., K]`` times the transpose of the weight, plus ``bias``, with gradients to all."""
        scale, zero = self.numbers()
        with torch.no_grad():  # for what reads the weight itself: DoRA's norms, a tied embedding
            self.live.scale.copy_(scale)
            if zero is not None:
                self.live.zero_point.copy_(zero)
        x, act = inputs_of(x, self.weight)
        return trained_linear(x, self.weight.operand(), scale, zero, bias, act)

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
    """A copy of scales or zero points in float32, read through their own scales where they are quantized."""
    plain = values.dequantize() if isinstance(values, HQQTensor) else values
    return plain.detach().to(torch.float32, copy=True)


def _like(values: Tensor, old: Tensor, name: str) -> Tensor:
    """``values`` stored in the dtype or bits of ``old``."""
    stored, _ = store(values, old.dtype, old.nbits if isinstance(old, HQQTensor) else None, name)
    return stored if isinstance(stored, Tensor) else HQQTensor.meta_from_encoded(stored)


class ScaleTraining:
    """Scales and zero points of a model in training; made by ``train_scales``. Use it with ``with``, or end it by hand.

    names: modules whose numbers are trained. left: quantized parameters that are not, such as experts and embeddings.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model, self.modules, self.names = model, modules, list(modules)
        self.original = {name: module._parameters["weight"] for name, module in modules.items()}
        self.by_id: dict[int, _Numbers] = {}
        for weight in self.original.values():
            self.by_id.setdefault(id(weight), _Numbers(weight.detach()))  # type: ignore[union-attr, arg-type]
        quantized = [(name, p) for name, p in model.named_parameters() if isinstance(p, HQQTensor)]
        self.left = [name for name, p in quantized if id(p) not in self.by_id]
        self.is_active = True
        self._instance_forward = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            numbers = self.by_id[id(self.original[name])]
            for parameter_name, parameter in zip(PARAMETERS, numbers.trained, strict=False):
                module.register_parameter(parameter_name, parameter)
            module.forward = functools.partial(_forward, numbers, module)  # type: ignore[method-assign]
        replace_parameters(model, {old: numbers.live for old, numbers in self.by_id.items()})

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to train, float32: for each weight the relative change of its scales, and the change of
        its zero points in codes (learned entries for a codebook), unless they are integers. All begin at 0."""
        return [parameter for numbers in self.by_id.values() for parameter in numbers.trained]

    def store(self) -> None:
        """End: the model has its weights with the trained numbers, rounded to the dtype or bits that they had.

        ValueError where they cannot be stored so; the model is then as it was before. RuntimeError after an end.
        """
        try:
            new = {id(numbers.live): nn.Parameter(numbers.stored(), False) for numbers in self.by_id.values()}
        except BaseException:
            self.restore()
            raise
        self._end(new)

    def restore(self) -> None:
        """End: the model has the weights that it had before. RuntimeError after an end."""
        old = {id(p): p for p in self.original.values()}
        self._end({id(numbers.live): old[key] for key, numbers in self.by_id.items()})  # type: ignore[misc]

    def _end(self, new_by_id: dict[int, nn.Parameter]) -> None:
        if not self.is_active:
            raise RuntimeError("this training of scales has ended; call train_scales again")
        for name, module in self.modules.items():
            module.__dict__.pop("forward", None)
            if self._instance_forward[name] is not None:
                module.forward = self._instance_forward[name]  # type: ignore[method-assign, assignment]
            for parameter_name in PARAMETERS:
                module._parameters.pop(parameter_name, None)
        replace_parameters(self.model, new_by_id)
        self.is_active = False

    def __enter__(self) -> "ScaleTraining":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_active:
            self.restore() if error else self.store()


def train_scales(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> ScaleTraining:
    """Make scales and zero points of ``model``'s quantized linear layers trainable parameters, until it is ended.

    filter_fn: called as ``filter_fn(module, name)``; whether to train those of this ``nn.Linear``. Default: all.

    The modules get the parameters ``scale_change`` and ``zero_change``, so optimizers, DDP and trainers that ask for
    ``model.parameters()`` see them; codes stay. They work under LoRA layers of peft, and a layer's size stays.
    ``with train_scales(model) as scales:`` stores the trained numbers at the end of the block, and after an error puts
    the old ones back. Do not save, move or copy the model before that.

    Memory: 24 bytes and what the optimizer takes for each scale and zero point, and ``ops.pieces.PIECE_BYTES`` of dense
    weights in a backward pass. ValueError where nothing can be trained.
    """
    modules = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_linear = isinstance(module, nn.Linear) and isinstance(weight, HQQTensor) and weight.ndim == 2
        if is_linear and not weight.transposed and (filter_fn is None or filter_fn(module, name)):  # type: ignore[union-attr]
            if set(PARAMETERS) & module._parameters.keys():
                raise ValueError(f"{name}: its scales are trained already; end that with store() or restore()")
            modules[name] = module
    if not modules:
        raise ValueError("nothing to train: no quantized nn.Linear of the model is chosen; call quantize_ first")
    return ScaleTraining(model, modules)


def _forward(numbers: _Numbers, module: Any, input: Tensor) -> Tensor:
    """``module(input)`` with the numbers in training; input has the name of nn.Linear's argument."""
    return numbers.linear(input, module.bias)
