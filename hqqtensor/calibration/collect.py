"""``calibrate``: one pass over the user's batches, and what it found."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.calibration.inputs import watch

MODES = ("diagonal", "full")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What each linear layer saw; give it to ``quantize_``.

    mode: "diagonal": second moments of the inputs weigh the errors in the solver. "full": error feedback column by
        column, for which ``quantize_`` runs ``batches`` again, once for each set of layers with a common input.
    moments: float32 ``[K]`` mean of x^2 for each input, by module name, in the order in which modules were called.
    tokens: inputs seen by each module. stages: modules with a common input, in the order of calls.
    unseen: linear layers that no batch reached: they are quantized without calibration.
    dead: number of inputs that were zero throughout, by module name, where there are any.
    """

    mode: str
    batches: list[Any]
    moments: dict[str, Tensor]
    tokens: dict[str, int]
    stages: list[list[str]]
    unseen: list[str]
    dead: dict[str, int]
    called_once: bool

    def report(self) -> str:
        """A few lines for people: layers and tokens seen, unseen layers, dead inputs."""
        fewest = min(self.tokens.values())
        lines = [f"{len(self.moments)} layers calibrated ({self.mode}), each on {fewest} tokens or more"]
        if self.unseen:
            lines.append(f"never reached, quantized without calibration: {', '.join(self.unseen)}")
        for name, count in self.dead.items():
            lines.append(f"{name}: {count} of {len(self.moments[name])} inputs are always zero")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    mode: str = "full",
    progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Run ``batches`` through ``model`` and note what its ``nn.Linear`` layers see; the model is left as it is.

    batches: what the model is called with: mappings (keyword arguments), tuples (positional) or single tensors, on
        the model's device. They are kept for "full". A few thousand tokens of typical text serve.
    progress: called as ``progress(done, total, name)`` after each batch.

    Memory: K floats a layer. ValueError for an unknown mode, no batches, no layer reached, or inputs not finite.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    kept = list(batches)
    if not kept:
        raise ValueError("calibrate needs at least one batch")
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.ndim == 2
    ]
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    calls: dict[str, int] = {}
    inputs: dict[str, tuple[Any, ...]] = {}
    held: list[Tensor] = []  # keeps the last input alive, so that its address stays its own

    def note(name: str, x: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device)
            tokens[name] = calls[name] = 0
            inputs[name] = (x.data_ptr(), x.shape, float(x[:1].sum()))
            held[:] = [x]
        sums[name] += x.to(torch.float32).square_().sum(0) if x.dtype != torch.float32 else x.square().sum(0)
        tokens[name] += len(x)
        calls[name] += 1

    watch(model, names, kept, note, progress=progress)
    if not sums:
        raise ValueError("no nn.Linear of the model was reached by the batches")
    moments = {name: total / max(1, tokens[name]) for name, total in sums.items()}
    for name, value in moments.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: its inputs are not finite on the calibration batches")
    stages: list[list[str]] = []
    for name in moments:
        if stages and inputs[name] == inputs[stages[-1][-1]]:
            stages[-1].append(name)
        else:
            stages.append([name])
    dead = {name: int((value == 0).sum()) for name, value in moments.items() if bool((value == 0).any())}
    unseen = [name for name in names if name not in moments]
    return Calibration(
        mode, kept, moments, tokens, stages, unseen, dead, all(count <= len(kept) for count in calls.values())
    )
