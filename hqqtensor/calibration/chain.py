"""Calibrated quantization of a chain of blocks, one block after the other, in time that grows with their number.

Two streams of hidden states run through the chain: that of the dense model, and that of the model as it is quantized so
far. In a block each set of layers with a common input is quantized on what it sees in the second stream, towards what
the dense layer gives in the first. Then the block, quantized, hands its stream on. No block runs twice from the start.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.calibration.blocks import BlockCall, Chain
from hqqtensor.calibration.experts import Routed, routed_calls
from hqqtensor.calibration.inputs import Pass, unpadded, watch
from hqqtensor.calibration.moments import InputMoments, MomentSums
from hqqtensor.calibration.train import Rounding, train_rounding
from hqqtensor.selection import is_experts
from hqqtensor.tensor import HQQTensor

IN_MEMORY = 4 << 30
"""Bytes of hidden states above which they are kept in files that are mapped into memory."""


class Stream:
    """The hidden states of all batches between two blocks, in memory or in files of ``folder``."""

    def __init__(self, hidden: Sequence[Tensor], folder: Path, name: str) -> None:
        self.tensors = list(hidden)
        self.is_on_disk = sum(t.nbytes for t in hidden) > IN_MEMORY
        if self.is_on_disk:
            for i, tensor in enumerate(hidden):
                mapped = torch.from_file(str(folder / f"{name}{i}"), True, tensor.numel(), dtype=tensor.dtype)
                self.tensors[i] = mapped.view(tensor.shape).copy_(tensor)

    def put(self, index: int, hidden: Tensor) -> None:
        """Replace what batch ``index`` has."""
        if self.is_on_disk and hidden.shape == self.tensors[index].shape:
            self.tensors[index].copy_(hidden)
        else:
            self.tensors[index] = hidden


class ChainRun:
    """A chain with its two streams. dense, quantized: traces of the same batches. training_steps: see ``train``."""

    def __init__(
        self, model: nn.Module, dense: Chain, quantized: Chain, masks: Sequence[Tensor | None], folder: Path,
        called_once: bool, training_steps: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.masks, self.called_once = model, masks, called_once
        self.training_steps = training_steps
        self.dense_calls, self.calls = dense.calls, quantized.calls
        self.dense = Stream(dense.hidden, folder, "dense")
        self.quantized = Stream(quantized.hidden, folder, "quantized")
        self.added: dict[str, bool] = {}  # see _is_added

    def state(self) -> dict[str, Any]:
        """What a run needs to go on with the next block."""
        return {"dense": self.dense.tensors, "quantized": self.quantized.tensors, "added": self.added}

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""
        for stream in (self.dense, self.quantized):
            for i, hidden in enumerate(state["dense" if stream is self.dense else "quantized"]):
                stream.put(i, hidden)
        self.added = state["added"]

    def run_block(
        self, index: int, name: str, stages: Sequence[Sequence[str]],
        quantize: Callable[[str, InputMoments], Tensor | None],
        quantize_experts: Callable[[str, Sequence[Routed]], None],
    ) -> None:  # fmt: skip
        """Quantize the layers of block ``index``; quantize(name, moments) is called for each and puts it into place.

        It gives by how many codes weights lay above their codes, or None. quantize_experts(name, calls) does so for
        modules of experts. stages: layers of the block with a common input, or such a module, in the order of calls.
        """
        block = self.model.get_submodule(name)
        above: dict[str, Tensor] = {}
        experts = {stage[0] for stage in stages if is_experts(self.model.get_submodule(stage[0]))}
        dense_rows = self._dense_rows(block, index, [stage[0] for stage in stages if stage[0] not in experts])
        last: _LastLayer | None = None
        for stage in stages:
            if stage[0] in experts:
                quantize_experts(stage[0], self._routed(block, index, stage[0]))
                continue
            rows = dense_rows.pop(stage[0])
            may_be_last = self.called_once and stage is stages[-1] and len(stage) == 1
            if may_be_last and self._is_added(block, index, name, stage[0]):
                last = _LastLayer(self.model.get_submodule(stage[0]))
                moments = self._last_moments(block, index, last)
            else:
                moments = self._moments(block, index, stage[0], rows)
            for layer in stage:
                lay_above = quantize(layer, moments)
                if lay_above is not None:
                    above[layer] = lay_above
        if self.training_steps and above:
            self._train(block, index, above)
        elif last is not None:
            for i, output in enumerate(last.quantized_outputs()):
                self.quantized.put(i, output)
            return
        watch(self.model, [], self._passes(block, self.calls[index], self.quantized, keep=True))

    def _passes(self, block: nn.Module, calls: Sequence[BlockCall], stream: Stream, keep: bool) -> list[Pass]:
        """A pass through the block for each batch; ``keep``: its result takes the place of what it was given."""

        def run(i: int) -> None:
            out = calls[i](block, stream.tensors[i])
            if keep:
                stream.put(i, out)

        return [Pass(functools.partial(run, i), mask) for i, mask in enumerate(self.masks)]

    def _dense_rows(self, block: nn.Module, index: int, leaders: Sequence[str]) -> dict[str, list[Tensor]]:
        """The inputs of the layers ``leaders`` in the dense model, in the order of calls; moves the dense stream on."""
        rows: dict[str, list[Tensor]] = {name: [] for name in leaders}
        passes = self._passes(block, self.dense_calls[index], self.dense, keep=True)
        # What lies in the stream itself is about to change.
        copied = self.dense.is_on_disk
        watch(self.model, leaders, passes, lambda name, x: rows[name].append(x.clone() if copied else x))
        return rows

    def _routed(self, block: nn.Module, index: int, name: str) -> list[Routed]:
        """What the module of experts ``name`` is called with in the quantized stream."""
        passes = self._passes(block, self.calls[index], self.quantized, keep=False)
        return routed_calls(self.model, name, passes, self.called_once)

    def _moments(self, block: nn.Module, index: int, leader: str, dense_rows: list[Tensor]) -> InputMoments:
        """Moments of the inputs of ``leader`` in the quantized stream, crossed with those in the dense one."""
        sums = MomentSums()
        calls = iter(dense_rows)

        def add(_name: str, x: Tensor) -> None:
            dense = next(calls, x)
            # Experts may be given other tokens in the two streams.
            sums.add(x, dense - x if dense.shape == x.shape else torch.zeros_like(x))

        passes = self._passes(block, self.calls[index], self.quantized, keep=False)
        watch(self.model, [leader], passes, add, stop=self.called_once)
        second, cross = sums.means()
        return InputMoments(second, cross=cross)

    def _is_added(self, block: nn.Module, index: int, name: str, layer: str) -> bool:
        """Whether what ``layer`` gives is added to the block's output as it is: tried once for each class of blocks."""
        key = f"{type(block).__module__}.{type(block).__qualname__}{layer.removeprefix(name)}"
        if key not in self.added:
            self.added[key] = _adds(
                block, self.model.get_submodule(layer), self.calls[index][0], self.quantized.tensors[0]
            )
        return self.added[key]

    def _last_moments(self, block: nn.Module, index: int, last: "_LastLayer") -> InputMoments:
        """Moments of the inputs of the last layer, with what the block's output lacks while that layer is dense."""
        sums = MomentSums()

        def run(i: int) -> None:
            output = last.run(self.calls[index][i], block, self.quantized.tensors[i])
            lacks = self.dense.tensors[i] - output
            sums.add(unpadded(last.inputs[i], self.masks[i]), unpadded(lacks, self.masks[i]))

        watch(self.model, [], [Pass(functools.partial(run, i), mask) for i, mask in enumerate(self.masks)])
        second, missing = sums.means()
        return InputMoments(second, missing=missing)

    def _train(self, block: nn.Module, index: int, above: dict[str, Tensor]) -> None:
        """Train the codes of the block's layers towards the dense stream behind it."""
        roundings = [Rounding(self.model.get_submodule(name), above[name]) for name in above]
        calls, hidden = self.calls[index], self.quantized.tensors
        train_rounding(
            roundings, lambda i: calls[i](block, hidden[i]), self.dense.tensors, self.masks, self.training_steps, index
        )


class _LastLayer:
    """The layer whose output a block adds to its own, with its inputs and the block's outputs while it is dense.

    Once it is quantized, the block's outputs differ by what the layer's do: the block need not run again.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.dense: Tensor = layer.weight  # type: ignore[assignment]
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def run(self, call: BlockCall, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the block gives of ``hidden``; notes it, and the layer's input."""

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.append((args[0] if args else kwargs["input"]).detach())

        handle = self.layer.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.outputs.append(call(block, hidden))
        finally:
            handle.remove()
        return self.outputs[-1]

    @torch.no_grad()
    def quantized_outputs(self) -> list[Tensor]:
        """What the block gives for each batch with the layer as it is now."""
        weight = self.layer.weight
        assert isinstance(weight, HQQTensor)
        change = weight.dequantize(torch.float32) - self.dense.detach().to(torch.float32)
        return [
            (output + nn.functional.linear(x.to(torch.float32), change).view_as(output)).to(output.dtype)
            for x, output in zip(self.inputs, self.outputs, strict=True)
        ]


@torch.no_grad()
def _adds(block: nn.Module, layer: nn.Module, call: BlockCall, hidden: Tensor) -> bool:
    """Whether the block's output changes by what is added to the layer's."""
    before = call(block, hidden).to(torch.float32)
    width = before.shape[-1]
    if getattr(layer, "out_features", None) != width:
        return False
    bump = before.abs().mean() * torch.linspace(-1, 1, width, device=before.device)
    handle = layer.register_forward_hook(lambda _module, _args, out: out + bump.to(out.dtype))
    try:
        change = call(block, hidden).to(torch.float32) - before
    finally:
        handle.remove()
    return bool((change - bump).abs().mean() <= 0.05 * bump.abs().mean())
