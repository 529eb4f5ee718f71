"""Calibration of the 3-D weights of transformers' expert modules: each expert on the tokens that are sent to it.

Such a module is called with hidden states, with the numbers of the experts that each token is sent to, and with their
shares. An expert makes ``down_proj(act(gate_up_proj(x)))`` of a token x. So the inputs of both of its weights are known
from one call of the module.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.calibration.inputs import Pass, unpadded, watch
from hqqtensor.calibration.moments import InputMoments, MomentSums

FLOOR = 128
"""Tokens that count as if an average expert had seen them, beside those that an expert did see.

Moments of few tokens say little: an expert that saw none has the moments of all experts, one that saw ``FLOOR`` tokens
has half of its own.
"""
CHECKED = 64
"""Tokens on which ``why_not`` compares."""
TOLERANCE = 0.05
"""Relative error up to which two outputs count as the same; bfloat16 rounds to 0.4 %."""


@dataclass(frozen=True)
class Routed:
    """What a module of experts is called with, without padding.

    hidden: ``[tokens, K]``. index, shares: ``[tokens, top_k]``, the experts that each token is sent to and the factors
    of what they give. A number from ``num_experts`` on stands for no expert.
    """

    hidden: Tensor
    index: Tensor
    shares: Tensor

    def of(self, expert: int) -> Tensor:
        """The hidden states of the tokens of one expert, ``[tokens, K]``."""
        return self.hidden[(self.index == expert).any(-1)]


@dataclass(frozen=True)
class ExpertMoments:
    """What the experts of a module see: tokens int64 ``[E]``, and by the name of the weight, ``diagonal`` float32
    ``[E, K]``, the mean of x^2 for each of its inputs, with ``FLOOR`` tokens of the average expert."""

    tokens: Tensor
    diagonal: dict[str, Tensor]


def routed(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mask: Tensor | None) -> Routed:
    """A call of a module of experts. mask: bool ``[B, S]``, False for padding. TypeError for other arguments."""
    hidden, index, shares = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())[:3]
    return Routed(*(unpadded(t.detach(), mask) for t in (hidden, index, shares)))


def routed_calls(model: nn.Module, name: str, passes: Sequence[Pass], stop: bool) -> list[Routed]:
    """Make ``passes`` and note the calls of the module of experts ``name``; stop: end each pass at the first."""
    module, calls = model.get_submodule(name), []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
        calls.append(routed(module, args, kwargs, mask))

    watch(model, [], passes, stop=stop, calls={name: note})
    return calls


def joined(calls: Sequence[Routed]) -> Routed:
    """All calls as one."""
    return Routed(*(torch.cat([getattr(call, name) for call in calls]) for name in ("hidden", "index", "shares")))


def expert_count(module: nn.Module) -> int:
    return len(module.down_proj)  # type: ignore[arg-type]


def inputs_of_down(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What ``down_proj`` of an expert is given, ``[tokens, I]``, for the hidden states x ``[tokens, K]``."""
    if not len(x):
        down: Any = module.down_proj
        return x.new_empty(0, down.shape[-2 if module.is_transposed else -1])
    if module.has_gate:
        return module._apply_gate(_linear(module, "gate_up_proj", expert, x))  # type: ignore[operator]
    return module.act_fn(_linear(module, "up_proj", expert, x))  # type: ignore[operator]


def _linear(module: nn.Module, leaf: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, leaf)[expert]
    x = x.to(weight.dtype)
    out = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
    return out + getattr(module, f"{leaf}_bias")[expert] if module.has_bias else out


@torch.no_grad()
def why_not(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why a module of experts cannot be calibrated, or None: whether it gives what its parts give as used here.

    args, kwargs: of a call of it.
    """
    try:
        call = routed(module, args, kwargs, None)
        x, index, shares = call.hidden[:CHECKED], call.index[:CHECKED], call.shares[:CHECKED]
        given = module.forward(x, index, shares).to(torch.float32)
        made = torch.zeros_like(given)
        for expert in range(expert_count(module)):
            token, place = (index == expert).nonzero(as_tuple=True)
            if len(token):
                out = _linear(module, "down_proj", expert, inputs_of_down(module, expert, x[token]))
                out = module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]
                made.index_add_(0, token, (out * shares[token, place, None]).to(torch.float32))
        error = (made - given).norm().item()
        same = error <= TOLERANCE * given.norm().item()
        return None if same else f"its output differs by {error:.3g} from what its weights give"
    except Exception as error:  # whatever a module that is built otherwise may raise
        return f"{type(error).__name__}: {error}"


def mixed(total: Tensor, tokens: Tensor | int, average: Tensor) -> Tensor:
    """Means of sums over ``tokens`` and ``FLOOR`` more tokens that have the ``average``."""
    return (total + FLOOR * average) / (tokens + FLOOR)


class ExpertSums:
    """Sums of squares of the inputs of each expert of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tokens = torch.zeros(expert_count(module), dtype=torch.int64)
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, call: Routed) -> None:
        """Count a call of the module; its weights are dense."""
        first = "gate_up_proj" if self.module.has_gate else "up_proj"
        for expert in range(len(self.tokens)):
            x = call.of(expert)
            self.tokens[expert] += len(x)
            for leaf, inputs in ((first, x), ("down_proj", inputs_of_down(self.module, expert, x))):
                squares = inputs.to(torch.float32).square().sum(0)
                of_leaf = self.sums.setdefault(leaf, [])
                if expert == len(of_leaf):
                    of_leaf.append(squares)
                else:
                    of_leaf[expert] += squares

    def means(self) -> ExpertMoments:
        diagonal = {}
        for leaf, sums in self.sums.items():
            total = torch.stack(sums)
            average = total.sum(0) / max(1, int(self.tokens.sum()))
            diagonal[leaf] = mixed(total, self.tokens[:, None].to(total.device), average)
        return ExpertMoments(self.tokens, diagonal)


@torch.no_grad()
def whole_moments(module: nn.Module, call: Routed, leaf: str) -> Callable[[int], InputMoments]:
    """The moments ``[K, K]`` of the inputs of the weight ``leaf``, by the number of the expert.

    Those of one expert are computed when they are asked for, with the weights that the module has then; in memory are
    those of the average expert.
    """

    def inputs(expert: int) -> Tensor:
        x = call.of(expert)
        return inputs_of_down(module, expert, x) if leaf == "down_proj" else x

    # Every token goes to as many experts, so that the average expert sees what all tokens are.
    average = MomentSums()
    for part in map(inputs, range(expert_count(module))) if leaf == "down_proj" else [call.hidden]:
        average.add(part)
    common, _ = average.means()

    @torch.no_grad()
    def of(expert: int) -> InputMoments:
        own = MomentSums()
        own.add(inputs(expert))
        return InputMoments(mixed(own.second, own.count, common))

    return of
