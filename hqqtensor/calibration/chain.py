"""Calibrated quantization of a chain of blocks, one block after the other, in time that grows with their number.

Two streams of hidden states run through the chain: that of the dense model, and that of the model as it is quantized so
far. In a block each set of layers with a common input is quantized on what it sees in the second stream, towards what
the dense layer gives in the first. Then the block, quantized, hands its stream on. No block runs twice from the start.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hqqtensor.calibration.blocks import BlockCall, Chain
from hqqtensor.calibration.inputs import Pass, watch
from hqqtensor.calibration.moments import InputMoments
from hqqtensor.calibration.train import Rounding, train_rounding

TRAIN = 0
RESIDUAL = True
IN_MEMORY = 4 << 30
"""Bytes of hidden states above which they are kept in files that are mapped into memory."""


class Stream:
    """The hidden states of all batches between two blocks, in memory or in files of ``folder``."""

    def __init__(self, hidden: Sequence[Tensor], folder: Path | None, name: str) -> None:
        self.tensors = list(hidden)
        self.is_on_disk = folder is not None and sum(t.nbytes for t in hidden) > IN_MEMORY
        if folder is not None and self.is_on_disk:
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
    """A chain with its two streams; ``dense`` and ``quantized`` are traces of the same batches."""

    def __init__(
        self, model: nn.Module, dense: Chain, quantized: Chain, masks: Sequence[Tensor | None], folder: Path | None,
        called_once: bool,
    ) -> None:  # fmt: skip
        self.model, self.masks, self.called_once = model, masks, called_once
        self.dense_calls, self.calls = dense.calls, quantized.calls
        self.dense = Stream(dense.hidden, folder, "dense")
        self.quantized = Stream(quantized.hidden, folder, "quantized")

    def run_block(
        self, index: int, name: str, stages: Sequence[Sequence[str]], quantize: Callable[[str, InputMoments], Tensor | None]
    ) -> None:
        """Quantize the layers of block ``index``; quantize(name, moments) is called for each and puts it into place.

        stages: layers of the block with a common input, in the order of calls.
        """
        block = self.model.get_submodule(name)
        above: dict[str, Tensor | None] = {}
        dense_rows = self._dense_rows(block, index, [stage[0] for stage in stages])
        for stage in stages:
            if RESIDUAL and stage is stages[-1] and len(stage) == 1 and self._ends_in(block, index, stage[0]):
                moments = self._last_moments(block, index, stage[0])
            else:
                moments = self._moments(block, index, stage[0], dense_rows.pop(stage[0]))
            for layer in stage:
                above[layer] = quantize(layer, moments)
        if TRAIN:
            layers = [name for stage in stages for name in stage]
            roundings = [Rounding(self.model.get_submodule(n), above[n]) for n in layers]
            calls = self.calls[index]
            got = train_rounding(roundings, lambda i: calls[i](block, self.quantized.tensors[i]), self.dense.tensors, self.masks, TRAIN)
            print(index, "%.3e %.3e" % got, flush=True)
        watch(self.model, [], self._passes(block, self.calls[index], self.quantized, keep=True), _ignore)

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

    def _moments(self, block: nn.Module, index: int, leader: str, dense_rows: list[Tensor]) -> InputMoments:
        """Moments of the inputs of ``leader`` in the quantized stream."""
        second = cross = torch.empty(0)
        count = position = 0

        def add(_name: str, x: Tensor) -> None:
            nonlocal second, cross, count, position
            x = x.to(torch.float32)
            if count == 0:
                second, cross = (torch.zeros(x.shape[-1], x.shape[-1], device=x.device) for _ in range(2))
            second.addmm_(x.T, x)
            dense = dense_rows[position] if position < len(dense_rows) else x
            if dense.shape == x.shape:  # experts may be given other tokens in the two streams
                cross.addmm_((dense.to(torch.float32) - x).T, x)
            count += len(x)
            position += 1

        passes = self._passes(block, self.calls[index], self.quantized, keep=False)
        watch(self.model, [leader], passes, add, stop=self.called_once)
        return InputMoments(second / max(1, count), cross / max(1, count))

    @torch.no_grad()
    def _ends_in(self, block: nn.Module, index: int, name: str) -> bool:
        """Whether what the layer ``name`` gives is added to the block's output as it is."""
        layer, call, hidden = self.model.get_submodule(name), self.calls[index][0], self.quantized.tensors[0]
        before = call(block, hidden)
        bump = before.abs().mean() * torch.linspace(-1, 1, before.shape[-1], device=before.device).to(before.dtype)
        if getattr(layer, "out_features", None) != before.shape[-1]:
            return False
        handle = layer.register_forward_hook(lambda _module, _args, out: out + bump)
        try:
            after = call(block, hidden)
        finally:
            handle.remove()
        return bool(((after - before - bump).abs().amax() <= 0.05 * bump.abs().amax()))

    def _last_moments(self, block: nn.Module, index: int, name: str) -> InputMoments:
        """Moments of the inputs of the layer that ends the block, with what the block's output lacks before it is quantized."""
        second = missing = torch.empty(0)
        count = 0
        seen: list[Tensor] = []
        calls = self.calls[index]

        def run(i: int) -> None:
            nonlocal second, missing, count
            seen.clear()
            lacks = self.dense.tensors[i].to(torch.float32) - calls[i](block, self.quantized.tensors[i]).to(torch.float32)
            mask = self.masks[i]
            padded = mask is not None and lacks.ndim == 3 and mask.shape == lacks.shape[:2]
            lacks = lacks[mask] if padded else lacks.flatten(0, -2)
            x = torch.cat(seen).to(torch.float32)
            if count == 0:
                second, missing = (torch.zeros(n, x.shape[1], device=x.device) for n in (x.shape[1], lacks.shape[1]))
            second.addmm_(x.T, x)
            missing.addmm_(lacks.T, x)
            count += len(x)

        passes = [Pass(functools.partial(run, i), mask) for i, mask in enumerate(self.masks)]
        watch(self.model, [name], passes, lambda _name, x: seen.append(x))
        return InputMoments(second / max(1, count), missing=missing / max(1, count))


def _ignore(_name: str, _rows: Tensor) -> None:
    pass
