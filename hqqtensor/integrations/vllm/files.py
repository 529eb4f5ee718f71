"""What vLLM's loader reads of files that hqqtensor wrote: whole weights under their names, not their packed parts."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import VLLM
from hqqtensor.serialization.files import open_file
from hqqtensor.serialization.header import read_header
from hqqtensor.serialization.load import read_files

MODULE = "vllm.model_executor.model_loader.weight_utils"
ITERATORS = ("safetensors_weights_iterator", "multi_thread_safetensors_weights_iterator")


class Reading:
    """What the loader of this process reads now. holds_quantized: whether hqqtensor wrote the files, so that what is
    dense in them is to stay dense."""

    holds_quantized = False


def quantized_entries(files: Sequence[str | Path]) -> dict[str, str]:
    """The JSON entry of each quantized weight in these safetensors files, by name; empty for files of others."""
    headers = {}
    for file in map(Path, files):
        with open_file(file) as f:
            headers[file] = f.metadata() or {}
    return read_header(headers).entries


def fingerprint(files: Sequence[str | Path]) -> str:
    """The same for the same quantized weights with the same settings, whatever their numbers."""
    text = "\n".join(f"{name} {entry}" for name, entry in sorted(quantized_entries(files).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored_weights(files: Sequence[str | Path]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint by name, memory-mapped; a weight that several names share comes under each."""
    state, aliases, hidden = read_files(files)
    yield from ((name, tensor) for name, tensor in state.items() if name not in hidden)
    yield from ((name, state[first]) for name, first in aliases.items())


def install() -> None:
    """Let vLLM's loader read files of hqqtensor."""
    for name in ITERATORS:
        patches.wrap(MODULE, name, _reads_ours, "loading quantized directories", VLLM)


def _reads_ours(iterate: Callable[..., Any]) -> Callable[..., Any]:
    def weights(hf_weights_files: list[str], *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        Reading.holds_quantized = bool(quantized_entries(hf_weights_files))
        if Reading.holds_quantized:
            yield from stored_weights(hf_weights_files)
        else:
            yield from iterate(hf_weights_files, *args, **kwargs)

    return weights
