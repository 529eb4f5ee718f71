"""What ``quantize_`` does with a calibration: it goes from layer to layer, the ones before quantized already."""

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hqqtensor.calibration.blocks import Chain, block_lists, trace
from hqqtensor.calibration.build import check_calibrated, experts_from_calibrated, from_calibrated
from hqqtensor.calibration.chain import ChainRun
from hqqtensor.calibration.collect import Calibration
from hqqtensor.calibration.experts import Routed, joined, routed_calls, whole_moments
from hqqtensor.calibration.inputs import mask_of, watch, whole_passes
from hqqtensor.calibration.moments import InputMoments, MomentSums
from hqqtensor.calibration.resume import ResumeFolder
from hqqtensor.calibration.train import STEPS
from hqqtensor.forward import evaluating
from hqqtensor.half_products import fast_half_products
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.selection import EXPERT_WEIGHTS, Choice
from hqqtensor.tensor import HQQTensor
from hqqtensor.weight_error import WeightError

MANY_STAGES = 12
"""Passes through the whole model that are made without a warning."""


def check_settings(choices: Iterable[Choice], mode: str) -> None:
    """ValueError naming the first layer whose settings calibration in this mode does not serve."""
    for choice in choices:
        if choice.is_experts or (choice.weight.ndim == 2 and not choice.transposed):
            check_calibrated(choice.settings, choice.names[0], mode)


def check_plan(choices: Sequence[Choice], calibration: Calibration) -> None:
    """ValueError naming the layer for settings that calibration does not serve, or inputs of another size."""
    names = [_calibrated_name(choice, calibration) for choice in choices]
    for choice, full in zip(choices, names, strict=True):
        moments = _diagonal(full, calibration)
        if moments is not None:
            check_calibrated(choice.settings, full, calibration.mode)
            *lead, _, inputs = choice.matrix_shape()
            if list(moments.shape) != [*lead, inputs]:
                raise ValueError(
                    f"{full}: calibrated on {_inputs(moments.shape)}, the weight has {_inputs([*lead, inputs])}; "
                    "calibrate this model"
                )
    if all(_diagonal(full, calibration) is None for full in names):
        raise ValueError("the calibration has none of the layers to quantize; calibrate this model")


def _inputs(shape: Sequence[int]) -> str:
    *experts, inputs = shape
    return f"{experts[0]} experts of {inputs} inputs" if experts else f"{inputs} inputs"


def _diagonal(full: str, calibration: Calibration) -> Tensor | None:
    """Mean of x^2 for each input of a weight, ``[K]`` or for experts ``[E, K]``; None where it was not seen."""
    name, _, leaf = full.rpartition(".")
    if name in calibration.experts:
        return calibration.experts[name].diagonal.get(leaf)
    return calibration.moments.get(name)


def quantize_calibrated(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Calibration,
    done: Callable[[int, str], None],
    kept: ResumeFolder | None = None,
    offloaded: OffloadedBlocks | None = None,
    error: WeightError | None = None,
) -> dict[int, nn.Parameter]:
    """The quantized weights of the calibrated layers of ``choices``, by id of the dense ones.

    done(elements, name): called after each, and after each expert of a stack. In mode "full" blocks of a model are
    quantized one after the other (``calibration.chain``); for layers outside of blocks the batches run once for each
    stage (layers with a common input) in a model whose earlier layers are quantized already. The model is left as it
    was, whatever ends the work. ValueError naming the layer where its scales cannot be stored.
    kept: an open folder, for what is finished; steps that are in it are not done again. offloaded: where the weights of
    blocks lie on disk; then ``kept`` is needed, and is to map what it keeps. error: is told of each layer.
    """
    work = _Work(model, choices, calibration, done, kept, offloaded, error)
    # Beside what is kept there is room for what does not fit into memory; the system's folder may be in memory itself.
    place = None if offloaded is None or kept is None else kept.path
    scratch = tempfile.TemporaryDirectory(prefix="hqqtensor-", dir=place)
    with evaluating(model), fast_half_products(), scratch as folder:
        try:
            work.report_finished()
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
            _run_chain(work, chain, dense.names)
    if outside > MANY_STAGES:
        warnings.warn(
            f"calibration ran the whole model anew for each of {outside} sets of layers: they lie in no list of blocks "
            "that hand hidden states on",
            stacklevel=5,
        )


def _run_chain(work: "_Work", chain: ChainRun, names: Sequence[str]) -> None:
    """Quantize the blocks ``names`` of a chain; a run that was interrupted goes on behind its last finished block."""
    is_behind = False
    for i, name in enumerate(names):
        if work.is_finished(name):
            is_behind = True
            continue
        if is_behind and work.kept is not None:
            chain.go_on(work.kept.streams(chain.dense.tensors[0].device, mmap=chain.dense.is_on_disk))
            is_behind = False
        stages = work.wanted(s for s in work.calibration.stages if s[0].startswith(f"{name}."))
        with work.in_memory(name):
            chain.run_block(i, name, stages, work.quantize, work.quantize_experts)
            work.keep(name, stages, chain.state() if i + 1 < len(names) else None)


def _traced_again(model: nn.Module, batches: list[Any], chain: Chain) -> Chain:
    """``chain`` in the model as it is now; as it was where its blocks are no chain any more."""
    return next(iter(trace(model, batches, [chain.names])), chain)


class _Work:
    """The weights to quantize, and those that are quantized and in their places so far."""

    def __init__(
        self, model: nn.Module, choices: Sequence[Choice], calibration: Calibration,
        done: Callable[[int, str], None], kept: ResumeFolder | None, offloaded: OffloadedBlocks | None,
        error: WeightError | None,
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.done, self.kept = model, calibration, done, kept
        self.offloaded, self.error = offloaded, error
        self.by_name = {_calibrated_name(choice, calibration): choice for choice in choices}
        self.quantized_by_id: dict[int, nn.Parameter] = {}
        self.replaced: list[tuple[nn.Module, str, nn.Parameter]] = []  # module, name there, dense weight

    def weights(self, name: str) -> list[str]:
        """Names in the model of the weights of a module that are to be quantized, in the order of their use."""
        names = (f"{name}.{leaf}" for leaf in ("weight", *EXPERT_WEIGHTS))
        return [full for full in names if full in self.by_name]

    def wanted(self, stages: Iterable[Sequence[str]]) -> list[list[str]]:
        """The modules of each stage that are to be quantized; stages that have none are left out."""
        each = ([name for name in stage if self.weights(name)] for stage in stages)
        return [names for names in each if names]

    def quantize_stage(self, stage: Sequence[str]) -> int:
        """Quantize the modules of a stage by a pass through the whole model; how many passes were made (0 or 1)."""
        names = next(iter(self.wanted([stage])), [])
        if not names or self.is_finished(stage[0]):
            return 0
        is_full = self.calibration.mode != "diagonal"
        if names[0] in self.calibration.experts:
            passes = whole_passes(self.model, self.calibration.batches)
            once = self.calibration.called_once
            calls = routed_calls(self.model, names[0], passes, once) if is_full else []
            with self.in_memory(names[0]):
                self.quantize_experts(names[0], calls)
                self.keep(stage[0], [names])
            return int(is_full)
        moments = _second_moments(self.model, names[0], self.calibration) if is_full else None
        with self.in_memory(names[0]):
            for name in names:
                self.quantize(name, moments or InputMoments(self.calibration.moments[name]))
            self.keep(stage[0], [names])
        return int(is_full)

    def quantize(self, name: str, moments: InputMoments) -> Tensor | None:
        """Quantize the weight of a module and put it into its place.

        Gives by how many codes each weight lay above its code, where errors were fed back.
        """
        full = f"{name}.weight"
        choice = self.by_name[full]
        if not bool(moments.diagonal.isfinite().all()):
            raise ValueError(f"{full}: its inputs are not finite on the calibration batches")
        weight = self.model.get_parameter(full)
        with _naming(full):
            quantized, above = from_calibrated(weight, choice.settings, moments)
        self._note_error(weight, quantized)
        self.put(full, quantized)
        self.done(choice.weight.numel(), full)
        return above

    def quantize_experts(self, name: str, calls: Sequence[Routed]) -> None:
        """Quantize the weights of a module of experts one after the other and put them into their places.

        calls: of the module in the model as it is now; without any the moments of the dense model serve.
        """
        module, diagonal = self.model.get_submodule(name), self.calibration.experts[name].diagonal
        for full in self.weights(name):
            choice, leaf = self.by_name[full], full.removeprefix(f"{name}.")
            moments = whole_moments(module, joined(calls), leaf) if calls else _of_expert(diagonal[leaf])
            rows = self.model.get_parameter(full).detach()
            rows = rows.transpose(-1, -2) if choice.transposed else rows
            done = functools.partial(self._done_expert, full, rows[0].numel())
            with _naming(full):
                quantized = experts_from_calibrated(rows, choice.settings, moments, done)
            self._note_error(rows, quantized)
            self.put(full, quantized.transpose(-1, -2) if choice.transposed else quantized)

    def _done_expert(self, full: str, elements: int, expert: int) -> None:
        self.done(elements, f"{full}[{expert}]")

    def is_finished(self, step: str) -> bool:
        """Whether a run that was interrupted has finished a step, the weights of which are then put in place."""
        if self.kept is None or step not in self.kept.steps:
            return False
        for full, weight in self.kept.steps[step].items():
            self.put(full, weight if self.offloaded is not None else weight.to(self.by_name[full].weight.device))
        return True

    def keep(self, step: str, stages: Iterable[Sequence[str]], streams: Any = None) -> None:
        """Keep the weights of the modules of a step, as they are in the model, for a run that goes on."""
        if self.kept is not None:
            names = [full for stage in stages for name in stage for full in self.weights(name)]
            self.kept.finish(step, {full: self.model.get_parameter(full).detach() for full in names}, streams)
            for full, weight in self.kept.steps[step].items():  # mapped, in place of the one in memory
                self._set(full, weight)

    def report_finished(self) -> None:
        """Count the weights that an interrupted run has finished."""
        names = [] if self.kept is None else [full for step in self.kept.steps.values() for full in step]
        if names:
            self.done(sum(self.by_name[full].weight.numel() for full in names), "finished before")

    def put(self, full: str, quantized: Tensor) -> None:
        """Put a quantized weight into its place."""
        name, _, leaf = full.rpartition(".")
        self.replaced.append((self.model.get_submodule(name), leaf, self.by_name[full].weight))
        self._set(full, quantized)

    def in_memory(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The weights of the block that the module ``name`` is in are in memory within the block of code."""
        return contextlib.nullcontext() if self.offloaded is None else self.offloaded.loaded(name)

    def _set(self, full: str, quantized: Tensor) -> None:
        name, _, leaf = full.rpartition(".")
        self.model.get_submodule(name)._parameters[leaf] = nn.Parameter(quantized, requires_grad=False)

    def _note_error(self, weight: Tensor, quantized: HQQTensor) -> None:
        if self.error is not None:
            self.error.add(weight, quantized)

    def restore(self) -> None:
        """Put the dense weights back; the quantized ones are noted as they are by then."""
        for module, leaf, dense in self.replaced:
            self.quantized_by_id[id(dense)] = module._parameters[leaf]  # type: ignore[assignment]
            module._parameters[leaf] = dense


@contextlib.contextmanager
def _naming(full: str) -> Iterator[None]:
    """A ValueError within the block names the weight ``full``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{full}: {error}") from None


def _of_expert(diagonal: Tensor) -> Callable[[int], InputMoments]:
    return lambda expert: InputMoments(diagonal[expert])


def _second_moments(model: nn.Module, name: str, calibration: Calibration) -> InputMoments:
    """Moments ``[K, K]`` of the inputs of ``name`` in the model as it is now."""
    sums = MomentSums()
    passes = whole_passes(model, calibration.batches)
    watch(model, [name], passes, lambda _name, x: sums.add(x), stop=calibration.called_once)
    return InputMoments(sums.means()[0])


def _calibrated_name(choice: Choice, calibration: Calibration) -> str:
    """The weight's name in a module that was calibrated, else its first: a tied embedding may come before lm_head."""
    return next((name for name in choice.names if _diagonal(name, calibration) is not None), choice.names[0])
