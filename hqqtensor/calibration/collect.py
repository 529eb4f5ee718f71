"""``calibrate``: one pass over the user's batches, and what its layers saw there."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.calibration.data import MANY_TOKENS, Source, batches_of
from hqqtensor.calibration.experts import FLOOR, ExpertMoments, ExpertSums, routed, why_not
from hqqtensor.calibration.inputs import watch, whole_passes
from hqqtensor.selection import is_experts

MODES = ("diagonal", "full", "trained")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of each linear layer, for ``quantize_(..., calibration=...)``.

    mode: "diagonal": second moments of the inputs weigh the errors in the solver. "full": error feedback column by
        column, for which ``quantize_`` runs ``batches`` again, block by block. "trained": then the codes of each block
        are trained towards the dense block's outputs.
    moments: float32 ``[K]`` mean of x^2 for each input, by module name, in the order in which modules were called.
    tokens: inputs seen by each module in the first ``passes`` batches, which moments, stages and dead are of: all of
        them in mode "diagonal"; else no more than show every layer and every input, since all run again later.
    stages: modules with a common input, in the order of calls.
    unseen: linear layers and modules of experts that no batch reached, or that are not understood (calibrate warns of
        those): they are quantized without calibration.
    dead: number of inputs that were zero throughout, by module name, where there are any.
    called_once: whether no module was called more than once in a pass, so that a pass may end when its input is seen.
    experts: moments of modules of 3-D expert weights, by module name; they are in ``stages`` too.
    """

    mode: str
    batches: list[Any]
    moments: dict[str, Tensor]
    tokens: dict[str, int]
    stages: list[list[str]]
    unseen: list[str]
    dead: dict[str, int]
    called_once: bool
    experts: dict[str, ExpertMoments] = dataclasses.field(default_factory=dict)
    passes: int = 1

    def report(self) -> str:
        """A few lines for people: layers and tokens seen, experts that saw few, unseen layers, dead inputs."""
        fewest = min(self.tokens.values()) * len(self.batches) // self.passes
        lines = [f"{len(self.moments)} layers calibrated ({self.mode}), each on about {fewest} tokens or more"]
        if self.experts:
            tokens = torch.cat([moments.tokens for moments in self.experts.values()])
            lines.append(
                f"{len(tokens)} experts in {len(self.experts)} modules, each on {int(tokens.min())} tokens or more; "
                f"{int((tokens < FLOOR).sum())} of them on fewer than {FLOOR}, where what all experts saw counts most"
            )
        if self.unseen:
            lines.append(f"never reached, quantized without calibration: {', '.join(self.unseen)}")
        for name, count in self.dead.items():
            lines.append(f"{name}: {count} of {len(self.moments[name])} inputs are always zero")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Source,
    mode: str = "full",
    progress: Callable[[int, int, str], None] | None = None,
    tokenizer: Any = None,
) -> Calibration:
    """Run ``batches`` through ``model`` and take statistics of the inputs of its ``nn.Linear`` layers and experts.

    batches: what the model is called with: mappings (keyword arguments), tuples (positional) or single tensors, on
        the model's device. The result holds them for "full". A few thousand tokens of typical text serve. Or "self",
        for text that the model writes itself, "random" for random tokens, or the path of a text file, which needs the
        model's ``tokenizer``: see ``hqqtensor.calibration.data.batches_of``.
    progress: called as ``progress(done, total, name)`` after each token that is written ("writing text") and each
        batch ("calibrating").

    The model is left as it was. Memory: K floats a layer or expert. Warns of modules of experts that do not work as
    those of transformers do. ValueError for an unknown mode, no batches, no layer reached, or inputs that are not
    finite.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    batches = batches_for(batches, model, mode, tokenizer, progress)
    if not batches:
        raise ValueError("calibrate needs at least one batch")
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.ndim == 2
    ]
    statistics = _InputStatistics()
    experts = {name: module for name, module in model.named_modules() if is_experts(module)}
    calls = {name: functools.partial(statistics.add_experts, name, module) for name, module in experts.items()}
    passes = 0
    for passes, one in enumerate(whole_passes(model, batches), 1):
        watch(model, names, [one], statistics.add, calls=calls)
        is_enough = mode != "diagonal" and not experts and statistics.has_seen(names)
        if progress is not None:
            progress(len(batches) if is_enough else passes, len(batches), "calibrating")
        if is_enough:
            break
    if not statistics.sums:
        raise ValueError("no nn.Linear of the model was reached by the batches")
    moments = {name: total / max(1, statistics.tokens[name]) for name, total in statistics.sums.items()}
    of_experts = {name: sums.means() for name, sums in statistics.experts.items() if sums is not None}
    seen = {name: [value] for name, value in moments.items()}
    seen |= {name: list(value.diagonal.values()) for name, value in of_experts.items()}
    for name, values in seen.items():
        if not all(bool(value.isfinite().all()) for value in values):
            raise ValueError(f"{name}: its inputs are not finite on the calibration batches")
    dead = {name: int((value == 0).sum()) for name, value in moments.items() if bool((value == 0).any())}
    unseen = [name for name in [*names, *experts] if name not in seen]
    called_once = all(count <= passes for count in statistics.calls.values())
    return Calibration(
        mode, batches, moments, statistics.tokens, statistics.stages(), unseen, dead, called_once, of_experts, passes
    )


def batches_for(
    source: Source, model: nn.Module, mode: str, tokenizer: Any, progress: Callable[[int, int, str], None] | None
) -> list[Any]:
    """The batches that ``calibrate`` runs in this mode."""
    if mode != "trained":
        return batches_of(source, model, tokenizer, progress=progress)
    # A step of training sees one batch: many small ones are the quicker way.
    return batches_of(source, model, tokenizer, MANY_TOKENS, windows=1, progress=progress)


class _InputStatistics:
    """Sums of squares of the inputs of modules, and which modules have their inputs in common."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # float32 [K], in the order in which modules were first called
        self.tokens: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.leaders: dict[str, set[str | None]] = {}  # modules that were called just before on the same input
        self.last_name: str | None = None
        self.last_rows: Tensor | None = None
        self.last_sum: Tensor | None = None
        self.experts: dict[str, ExpertSums | None] = {}  # None for a module that is not understood

    def add_experts(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None
    ) -> None:
        """Count a call of a module of experts. Warns at the first where it is not understood."""
        if name not in self.experts:
            reason = why_not(module, args, kwargs)
            self.experts[name] = None if reason else ExpertSums(module)
            if reason:
                warnings.warn(f"{name}: quantized without calibration, {reason}", stacklevel=2)
        sums = self.experts[name]
        if sums is not None:
            sums.add(routed(module, args, kwargs, mask))
            self.calls[name] = self.calls.get(name, 0) + 1
            self.leaders.setdefault(name, {None})  # no layer has its input in common with experts

    def add(self, name: str, rows: Tensor) -> None:
        """Count the input ``rows [tokens, K]`` of a call of the module ``name``; see ``watch``."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows.shape[-1], dtype=torch.float32, device=rows.device)
            self.tokens[name] = self.calls[name] = 0
            self.leaders[name] = set()
        is_shared = rows is self.last_rows
        if not is_shared or self.last_sum is None:
            self.last_sum = rows.to(torch.float32).square().sum(0)
        self.sums[name] += self.last_sum
        self.tokens[name] += len(rows)
        self.calls[name] += 1
        self.leaders[name].add(self.last_name if is_shared else None)
        self.last_name, self.last_rows = name, rows

    def has_seen(self, names: Collection[str]) -> bool:
        """Whether all of ``names`` were called, and none of their inputs was zero throughout."""
        return len(self.sums) == len(names) and all(bool((total != 0).all()) for total in self.sums.values())

    def stages(self) -> list[list[str]]:
        """Runs of modules that had the same input in every one of their calls, in the order of calls."""
        stages: list[list[str]] = []
        for name, leaders in self.leaders.items():
            previous = stages[-1][-1] if stages else None
            if previous is not None and leaders == {previous} and self.calls[name] == self.calls[previous]:
                stages[-1].append(name)
            else:
                stages.append([name])
        return stages
