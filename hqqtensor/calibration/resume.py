"""A calibrated quantization that goes on after it was interrupted: what is finished is kept in a folder.

    run.json            what the run is: settings, and digests of the model and of what it is calibrated on
    batches.pt          the text that the model wrote
    calibration.pt      what the first pass saw
    weights-00012.pt    quantized weights of a step: a block, or layers with a common input outside of blocks
    streams-00012.pt    the hidden states behind that block, where another follows

A file is written beside its place and then renamed, and streams before the weights of their step. So a step is finished
if its weights are there, whenever the process was killed. run.json goes by another name while the folder is emptied.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.calibration.collect import Calibration, batches_for, calibrate
from hqqtensor.calibration.data import Source
from hqqtensor.calibration.experts import ExpertMoments
from hqqtensor.forward import device_of
from hqqtensor.run_record import NAME, ResumeError, begin, check_same, digest, is_begun
from hqqtensor.tensor import HQQTensor
from hqqtensor.whole_file import PART, write_whole

SAMPLE = 4096
"""Numbers of each parameter that count for the digest of a model, evenly spread."""
CPU = torch.device("cpu")
_EMPTYING = "run-that-is-removed.json"
_OURS = re.compile(r"(run\.json|(batches|calibration|(weights|streams)-\d{5})\.pt)(\.part)?")


class ResumeFolder(os.PathLike[str]):
    """The folder ``path`` of one run, for ``quantize_(..., resume=...)``.

    quantize_ empties a folder that it is given by name, and leaves a ``ResumeFolder`` to the caller, who may want to
    keep it until the weights are saved. steps: the weights of each finished step by name, those of this process empty.
    is_mapped: weights stay on disk, those of this process too: ``steps`` has all of them, mapped into memory.
    """

    def __init__(self, path: str | os.PathLike[str], is_mapped: bool = False) -> None:
        self.path, self.is_mapped = Path(path), is_mapped
        self.run: dict[str, Any] = {}
        self.steps: dict[str, dict[str, Tensor]] = {}

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on with."""
        return is_begun(self.path)

    @property
    def has_batches(self) -> bool:
        """Whether the text that the model was to write is there."""
        return (self.path / "batches.pt").is_file()

    def describe(
        self, model: nn.Module, settings: Mapping[str, Any], names: Sequence[str], identity: str | None = None
    ) -> None:
        """Say what the run is, but for its calibration.

        settings: what ``HqqConfig.to_dict`` gives. names: of the weights to quantize. identity: what tells the model
        from others, where its numbers are not in memory.
        """
        if identity is None:
            parameters = {name: (list(p.shape), str(p.dtype), _sample(p)) for name, p in model.named_parameters()}
            identity = digest(parameters)
        self.run = {
            "hqqtensor": sys.modules["hqqtensor"].__version__,  # an import would be a circle
            "torch": torch.__version__,
            "settings": dict(settings),
            "names of the weights": digest(names),
            "model": identity,
        }

    def open(self, mode: str, calibrated_on: str) -> None:
        """Begin the run, or read what is finished of it. ResumeError where the folder holds something else."""
        self.run |= {"mode": mode, "calibrated on": calibrated_on}
        if (self.path / _EMPTYING).exists():
            self.empty()
        if not self.is_begun:
            if self.path.exists() and any(not name.endswith(PART) for name in os.listdir(self.path)):
                raise ResumeError(f"{self.path} is not empty and holds no interrupted run")
            begin(self.path, self.run)
            return
        check_same(self.path, self.run)
        for file in sorted(self.path.glob("weights-*.pt")):
            step = _read(file, CPU, self.is_mapped)
            if not isinstance(step, dict) or not isinstance(step.get("step"), str):
                raise ResumeError(f"{file} is damaged; remove the folder")
            weights = step.get("weights")
            if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
                raise ResumeError(f"{file} is damaged; remove the folder")
            self.steps[step["step"]] = weights

    def load(self, name: str, device: torch.device, mmap: bool = False) -> Any:
        """What ``save`` was given under this name; None where it was not, ResumeError where the file is damaged."""
        file = self.path / f"{name}.pt"
        return _read(file, device, mmap) if file.is_file() else None

    def save(self, name: str, value: Any) -> None:
        """Keep tensors and plain values under a name."""
        write_whole(self.path, f"{name}.pt", lambda file: write_archive(value, file))

    def finish(self, step: str, weights: Mapping[str, Tensor], streams: Any = None) -> None:
        """Keep the weights of a step, and the streams that the next one needs."""
        number = f"{len(self.steps):05}"
        if streams is not None:
            self.save(f"streams-{number}", streams)
        self.save(f"weights-{number}", {"step": step, "weights": dict(weights)})
        self.steps[step] = self.load(f"weights-{number}", CPU, mmap=True)["weights"] if self.is_mapped else {}
        for file in self.path.glob("streams-*.pt"):
            if file.stem != f"streams-{number}":
                file.unlink()

    def streams(self, device: torch.device, mmap: bool) -> Any:
        """The streams behind the last finished step."""
        return self.load(f"streams-{len(self.steps) - 1:05}", device, mmap)

    def empty(self) -> None:
        """Remove what this class has written, not the folder. Whatever stops this, the next run goes on with it."""
        if self.is_begun:
            os.replace(self.path / NAME, self.path / _EMPTYING)
        for name in os.listdir(self.path):
            if _OURS.fullmatch(name):
                (self.path / name).unlink()
        (self.path / _EMPTYING).unlink(missing_ok=True)


def calibrated(
    model: nn.Module, source: Source | Calibration, mode: str, tokenizer: Any,
    progress: Callable[[int, int, str], None] | None, folder: ResumeFolder,
) -> Calibration:  # fmt: skip
    """The calibration that ``quantize_`` is to use, taken from ``folder`` as far as it is there; opens the folder."""
    if isinstance(source, Calibration):
        folder.open(mode, digest([source.batches, source.moments, source.stages]))
        return dataclasses.replace(source, mode=mode)
    device = device_of(model)
    if isinstance(source, str) and source == "self":
        folder.open(mode, source)
        batches = folder.load("batches", device)
        if batches is None:
            batches = batches_for(source, model, mode, tokenizer, progress)
            folder.save("batches", batches)
    else:
        batches = batches_for(source, model, mode, tokenizer, progress)
        folder.open(mode, digest(batches))
    seen = folder.load("calibration", device)
    if seen is not None:
        experts = {name: ExpertMoments(**moments) for name, moments in seen.pop("experts").items()}
        return Calibration(batches=batches, experts=experts, **seen)
    calibration = calibrate(model, batches, mode, progress)
    seen = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(calibration) if f.name != "batches"}
    folder.save("calibration", seen | {"experts": {k: vars(v) for k, v in calibration.experts.items()}})
    return calibration


def write_archive(value: Any, file: Any) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:  # of closing an archive that could not be written: what stopped it came before
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


def _read(file: Path, device: torch.device, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location=device, mmap=mmap, weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a damaged pickle raises anything: struct.error, IndexError, TypeError
        first = (str(error).splitlines() or [""])[0]
        raise ResumeError(f"{file} is damaged; remove the folder ({first})") from None


def _sample(parameter: Tensor) -> Tensor:
    flat = (parameter.qdata if isinstance(parameter, HQQTensor) else parameter).detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]
