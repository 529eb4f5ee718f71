"""What ``quantize_`` does with a calibration: it goes from layer to layer, the ones before quantized already."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hqqtensor.calibration.blocks import Chain, block_lists, trace
from hqqtensor.calibration.build import check_calibrated, from_calibrated
from hqqtensor.calibration.chain import ChainRun
from hqqtensor.calibration.collect import Calibration
from hqqtensor.calibration.inputs import mask_of, watch, whole_passes
from hqqtensor.calibration.moments import InputMoments, MomentSums
from hqqtensor.calibration.train import STEPS
from hqqtensor.forward import evaluating
from hqqtensor.selection import Choice

MANY_STAGES = 12
"""Passes through the whole model that are made without a warning."""


def check_settings(choices: Iterable[Choice], mode: str) -> None:
    """ValueError naming the first layer whose settings calibration in this mode does not serve."""
    for choice in choices:
        if choice.weight.ndim == 2 and not choice.transposed:
            check_calibrated(choice.settings, choice.names[0], mode)


def check_plan(choices: Sequence[Choice], calibration: Calibration) -> None:
    """ValueError naming the layer for settings that calibration does not serve, or inputs of another size."""
    for choice in choices:
        full, weight = _calibrated_name(choice, calibration), choice.weight
        name = _module(full)
        if name in calibration.moments:
            check_calibrated(choice.settings, full, calibration.mode)
            if len(calibration.moments[name]) != weight.shape[-1]:
                raise ValueError(
                    f"{full}: calibrated on {len(calibration.moments[name])} inputs, the weight has "
                    f"{weight.shape[-1]}; calibrate this model"
                )
    if not any(_module(_calibrated_name(choice, calibration)) in calibration.moments for choice in choices):
        raise ValueError("the calibration has none of the layers to quantize; calibrate this model")


def quantize_calibrated(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Calibration,
    done: Callable[[nn.Parameter, str], None],
) -> dict[int, nn.Parameter]:
    """The quantized weights of the calibrated layers of ``choices``, by id of the dense ones.

    done(weight, name): called after each. In mode "full" blocks of a model are quantized one after the other
    (``calibration.chain``); for layers outside of blocks the batches run once for each stage (layers with a common
    input) in a model whose earlier layers are quantized already. The model is left as it was, whatever ends the work.
    ValueError naming the layer where its scales cannot be stored.
    """
    work = _Work(model, choices, calibration, done)
    with evaluating(model), tempfile.TemporaryDirectory(prefix="hqqtensor-") as folder:
        try:
            if calibration.mode == "diagonal":
                for stage in calibration.stages:
                    work.quantize_stage(stage)
            else:
                _in_order(work, Path(folder))
        finally:
            work.restore()
    return work.quantized_by_id


def _in_order(work: "_Work", folder: Path) -> None:
    """Stages in the order of calls; where one lies in a chain of blocks, the whole chain at once."""
    model, calibration = work.model, work.calibration
    lists = block_lists(model)
    chains = trace(model, calibration.batches, lists) if lists else []
    chain_of = {block: i for i, chain in enumerate(chains) for block in chain.names}
    masks = [mask_of(batch) for batch in calibration.batches]
    finished: set[int] = set()
    steps = STEPS if calibration.mode == "trained" else 0
    outside = 0
    for stage in calibration.stages:
        index = next((i for block, i in chain_of.items() if stage[0].startswith(f"{block}.")), None)
        if index is None:
            outside += work.quantize_stage(stage)
        elif index not in finished:
            finished.add(index)
            dense = chains[index]
            now = dense if not work.replaced else _traced_again(model, calibration.batches, dense)
            chain = ChainRun(model, dense, now, masks, folder, calibration.called_once, steps)
            for i, block in enumerate(dense.names):
                of_block = [s for s in calibration.stages if s[0].startswith(f"{block}.")]
                chain.run_block(i, block, work.wanted(of_block), work.quantize)
    if outside > MANY_STAGES:
        warnings.warn(
            f"calibration ran the whole model anew for each of {outside} sets of layers: they lie in no list of blocks "
            "that hand hidden states on",
            stacklevel=5,
        )


def _traced_again(model: nn.Module, batches: list[Any], chain: Chain) -> Chain:
    """``chain`` in the model as it is now; as it was where its blocks are no chain any more."""
    return next(iter(trace(model, batches, [chain.names])), chain)


class _Work:
    """The weights to quantize, and those that are quantized and in their places so far."""

    def __init__(
        self, model: nn.Module, choices: Sequence[Choice], calibration: Calibration,
        done: Callable[[nn.Parameter, str], None],
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.done = model, calibration, done
        self.by_module = {_module(_calibrated_name(choice, calibration)): choice for choice in choices}
        self.quantized_by_id: dict[int, nn.Parameter] = {}
        self.replaced: list[tuple[nn.Module, nn.Parameter]] = []

    def wanted(self, stages: Iterable[Sequence[str]]) -> list[list[str]]:
        """The modules of each stage that are to be quantized; stages that have none are left out."""
        each = ([name for name in stage if name in self.by_module] for stage in stages)
        return [names for names in each if names]

    def quantize_stage(self, stage: Sequence[str]) -> int:
        """Quantize the modules of a stage by a pass through the whole model; how many passes were made (0 or 1)."""
        names = next(iter(self.wanted([stage])), [])
        is_full = self.calibration.mode != "diagonal"
        moments = _second_moments(self.model, names[0], self.calibration) if names and is_full else None
        for name in names:
            self.quantize(name, moments or InputMoments(self.calibration.moments[name]))
        return int(bool(names) and is_full)

    def quantize(self, name: str, moments: InputMoments) -> Tensor | None:
        """Quantize the weight of a module; with whole moments it takes its place in the model.

        Gives by how many codes each weight lay above its code, where errors were fed back.
        """
        full, weight = f"{name}.weight", self.by_module[name].weight
        try:
            quantized, above = from_calibrated(weight, self.by_module[name].settings, moments)
        except ValueError as error:
            raise ValueError(f"{full}: {error}") from None
        self.quantized_by_id[id(weight)] = nn.Parameter(quantized, requires_grad=False)
        if moments.second.ndim == 2:
            module = self.model.get_submodule(name)
            self.replaced.append((module, weight))
            module._parameters["weight"] = self.quantized_by_id[id(weight)]
        self.done(weight, full)
        return above

    def restore(self) -> None:
        """Put the dense weights back; the quantized ones are noted as they are by then."""
        for module, weight in self.replaced:
            self.quantized_by_id[id(weight)] = module._parameters["weight"]  # type: ignore[assignment]
            module._parameters["weight"] = weight


def _second_moments(model: nn.Module, name: str, calibration: Calibration) -> InputMoments:
    """Moments ``[K, K]`` of the inputs of ``name`` in the model as it is now."""
    sums = MomentSums()
    passes = whole_passes(model, calibration.batches)
    watch(model, [name], passes, lambda _name, x: sums.add(x), stop=calibration.called_once)
    return InputMoments(sums.means()[0])


def _calibrated_name(choice: Choice, calibration: Calibration) -> str:
    """The weight's name in a module that was calibrated, else its first: a tied embedding may come before lm_head."""
    return next((name for name in choice.names if _module(name) in calibration.moments), choice.names[0])


def _module(full: str) -> str:
    return full.rpartition(".")[0]
