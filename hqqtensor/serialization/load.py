"""load_model: a checkpoint into a model, memory-mapped, checked before anything changes."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.quantize import show_quantized
from hqqtensor.serialization.files import checkpoint_files, read_tensors
from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import from_llama
from hqqtensor.serialization.gptq_checkpoint import from_packed, is_packed
from hqqtensor.serialization.header import read_header
from hqqtensor.serialization.hqq_checkpoint import from_flat, is_flat, pickle_file, read_pickle
from hqqtensor.serialization.layout import CheckpointError, InputError, build, keys_of, parse_entry
from hqqtensor.tensor import HQQTensor
from hqqtensor.transfer import is_packed as is_packed_stream


def read_checkpoint(
    path: str | os.PathLike, act_order: str = "error", mmap: bool = True
) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """The state of a checkpoint, its aliases {name: stored name}, and its non-persistent buffers.

    act_order: what becomes of GPTQ layers in an order of their own, see ``gptq_layer.read_packed``. mmap: map the
    files, which must then stay as they are for as long as a tensor is in use, or read them into memory. GGUF files are
    read in any case.
    """
    if Path(path).suffix == ".gguf":
        return from_llama(open_gguf(path)), {}, set()
    if is_packed_stream(path):
        raise InputError(
            f"{os.fspath(path)} is packed for transfer; first run hqqtensor unpack FILE DIR, then load DIR"
        )
    pickle = pickle_file(path)
    return (
        read_files(checkpoint_files(path), act_order, mmap)
        if pickle is None
        else (read_pickle(pickle, mmap), {}, set())
    )


def read_files(
    files: Sequence[str | os.PathLike], act_order: str = "error", mmap: bool = True
) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """``read_checkpoint`` for the files of one checkpoint."""
    tensors: dict[str, Tensor] = {}
    headers: dict[Path, dict[str, str]] = {}
    for file in map(Path, files):
        some, headers[file] = read_tensors(file, mmap=mmap)
        tensors |= some
    if is_flat(tensors):
        return from_flat(tensors), {}, set()
    if is_packed(tensors):
        return from_packed(tensors, Path(files[0]).parent, act_order), {}, set()
    header = read_header(headers)
    state: dict[str, Tensor] = {}
    for name, text in header.entries.items():
        entry = parse_entry(name, text)
        state[name] = build(name, entry, tensors)
        for key in keys_of(name, entry):
            tensors.pop(key, None)
    return {**tensors, **state}, header.aliases, header.hidden


def load_model(
    model: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    device: torch.device | str = "cpu",
    mmap: bool = True,
) -> tuple[list[str], list[str]]:
    """Load a checkpoint of ``save_model`` into ``model``, in memory or on the meta device, quantized or not.

    A checkpoint of the hqq library (flat safetensors or ``qmodel.pt``), of GPTQ or AWQ (its directory) and a llama
    model's ``.gguf`` file are read as well, their codes packed anew.
    Quantized weights, and all that is on the meta device, are put in place as they lie in the memory-mapped file;
    other tensors are copied into the model's own. A mapped file must stay as it is while the model is in use; with
    ``mmap=False`` the files are read into memory that belongs to this process alone.
    Returns (missing, unexpected) names; with ``strict`` either raises RuntimeError. CheckpointError (a ValueError) for
    a file that is missing, cut short, or does not hold what it claims or what the model needs. Nothing changes on an
    error: what can fail (a device that is missing or full, a tensor that cannot be written) is tried before the first
    weight is. Only an interrupt (Ctrl-C) while dense weights are copied leaves some of them old and some new.
    """
    state, aliases, extra = read_checkpoint(path, mmap=mmap)
    places: dict[str, tuple[nn.Module, str, bool]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        places |= {f"{dot}{n}": (module, n, True) for n, p in module._parameters.items() if p is not None}
        places |= {f"{dot}{n}": (module, n, False) for n, b in module._buffers.items() if b is not None}
    wanted = set(model.state_dict())
    source = {name: aliases.get(name, name) for name in places}
    plan: dict[str, Tensor] = {}
    for name, (module, leaf, _) in places.items():
        new = state.get(source[name])
        old: Tensor = getattr(module, leaf)
        if new is None or (name not in wanted and old.device.type != "meta"):
            continue
        if new.shape != old.shape:
            raise CheckpointError(f"{name}: the file has shape {list(new.shape)}, the model {list(old.shape)}")
        plan[name] = new
    hidden = [n for n, (_, _, is_parameter) in places.items() if not is_parameter and n not in wanted]
    plan |= _computed_buffers(model, [n for n in hidden if n not in plan and model.get_buffer(n).is_meta])
    ties = _ties(places)
    missing = sorted(n for n in wanted if n in places and n not in plan and not (ties[n] & plan.keys()))
    missing += sorted(n for n in wanted if n not in places)
    taken = {source[n] for n in plan}
    unexpected = sorted(n for n in state if n not in taken and n not in extra)
    if strict and (missing or unexpected):
        raise RuntimeError(f"load_model: missing {missing}, unexpected {unexpected} in {os.fspath(path)}")
    replaced, copies = _prepare(places, plan, source, torch.device(device))
    with torch.no_grad():
        for old, new in copies:
            old.copy_(new)
    for module, leaf, is_parameter in places.values():
        table: Any = module._parameters if is_parameter else module._buffers
        if id(table[leaf]) in replaced:
            table[leaf] = replaced[id(table[leaf])]
    for module in model.modules():
        show_quantized(module)
    return missing, unexpected


def _prepare(
    places: Any, plan: dict[str, Tensor], source: dict[str, str], device: torch.device
) -> tuple[dict[int, Tensor], list[tuple[Tensor, Tensor]]]:
    """What replaces a tensor of the model, by its id, and what is copied into one: (model's, file's). All that can
    fail of either fails here, where the model is not yet changed."""
    moved: dict[tuple[str, bool], Tensor] = {}
    replaced: dict[int, Tensor] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for name, new in plan.items():
        module, leaf, is_parameter = places[name]
        old = getattr(module, leaf)
        if not (isinstance(new, HQQTensor) or isinstance(old, HQQTensor) or old.device.type == "meta"):
            _try_copy(name, old, new)
            copies.append((old, new))
            continue
        key = (source[name], is_parameter)
        if key not in moved:
            tensor = new.to(device)
            if is_parameter:
                trains = not isinstance(new, HQQTensor) and new.is_floating_point() and old.requires_grad
                tensor = nn.Parameter(tensor, requires_grad=trains)
            moved[key] = tensor
        replaced[id(old)] = moved[key]
    return replaced, copies


@torch.no_grad()
def _try_copy(name: str, old: Tensor, new: Tensor) -> None:
    """Raise, naming the tensor, where ``old.copy_(new)`` would: a copy of no numbers meets the same checks."""
    try:
        if any(step == 0 and extent > 1 for step, extent in zip(old.stride(), old.shape, strict=True)):
            raise RuntimeError("several of its elements share memory")
        none = [t[:0] if t.ndim else t.reshape(1)[:0] for t in (old, new)]
        none[0].copy_(none[1])
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise RuntimeError(f"{name}: the model's tensor cannot be written: {error}") from error


def _computed_buffers(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Values for buffers on the meta device that no file holds, as they are not persistent; a warning without one."""
    computed: dict[str, Tensor] = {}
    if names and "transformers" in sys.modules:
        from hqqtensor.integrations.transformers.buffers import computed_buffers

        computed = computed_buffers(model, names)
    left = [name for name in names if name not in computed]
    if left:
        warnings.warn(
            f"load_model: {', '.join(left)} is still on the meta device: the file holds no buffers that are not "
            "persistent. Build the model with buffers in memory: accelerate.init_empty_weights(include_buffers=False)",
            stacklevel=3,
        )
    return computed


def _ties(places: Any) -> dict[str, set[str]]:
    groups: dict[int, set[str]] = {}
    for name, (module, leaf, _) in places.items():
        groups.setdefault(id(getattr(module, leaf)), set()).add(name)
    return {name: groups[id(getattr(m, leaf))] for name, (m, leaf, _) in places.items()}
