"""load: the model of a quantized transformers directory, memory-mapped."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqtensor.empty_parameters import empty_parameters
from hqqtensor.model_config import quantized_settings
from hqqtensor.parameters import replace_parameters
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.serialization.load import load_model


def load(
    directory: str | os.PathLike[str], dtype: torch.dtype | None = None, generation: bool = False, mmap: bool = True
) -> Any:
    """The model of a directory that ``hqqtensor quantize`` or ``save_pretrained`` wrote, in eval mode, on the CPU.

    Its class is the one that config.json names. Packed weights, and dense ones in the file's dtype, are mapped and used
    as they lie in the file: only headers and scales that are no codes themselves are read (they are checked for NaN),
    the rest comes from the disk when it is first used, and processes that load the same directory share its memory.
    ``dtype``: a floating dtype to compute in, by default that of the file; dense weights of another one are copied.
    ``generation``: call ``prepare_for_generation_`` too. It copies the packed weights into memory of this process
    alone, where the kernels read them fastest; ``prepare_for_generation_(model, copy_weights=False)`` does not.
    ``mmap``: False reads the files into memory of this process instead. A file that is mapped must stay as it is while
    the model is in use: one that is cut short ends the process, one that is written to changes the model's numbers.

    InputError (a ValueError) where the directory is not of this kind, CheckpointError (a ValueError) where it is
    damaged or leaves a parameter without a value, ImportError without transformers, ValueError for
    ``generation`` where ``prepare_for_generation_`` cannot serve the model, or a dtype that is none.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    directory = Path(directory)
    model = empty_model(directory, quantized_settings(directory))
    load_model(model, directory, mmap=mmap)
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{directory} has no value for {len(missing)} parameters, e.g. {missing[0]}")
    if dtype is not None:
        _convert(model, dtype)
    if not generation:
        return model
    from hqqtensor.generation import prepare_for_generation_  # needs transformers, which may be missing until here

    return prepare_for_generation_(model)


def empty_model(directory: Path, settings: Mapping[str, Any], otherwise: torch.dtype | None = None) -> Any:
    """The model of a directory in eval mode, tied as it is to be, with its parameters on the meta device.

    settings: the contents of its config.json. otherwise: builds it in the dtype that config.json names, else in this;
    None in float32. ImportError says what to install.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"load needs transformers (pip install 'hqqtensor[cli]'): {error}") from error
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    build = getattr(transformers, name, None) if name else None
    # Weights need no random numbers, which take half of the time even on the meta device. Buffers are real: those that
    # are not persistent (rotary frequencies) are in no checkpoint.
    dtype = torch.float32 if otherwise is None else getattr(config, "dtype", None) or otherwise
    with _default_dtype(dtype), empty_parameters():
        model: Any = (build or transformers.AutoModel.from_config)(config)
    for part in model.modules():
        for module in part.modules() if isinstance(part, transformers.PreTrainedModel) else ():
            if module._non_persistent_buffers_set:
                part._init_weights(module)
    model.tie_weights()
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


_DTYPE = threading.Lock()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype, which all threads share; it is not touched where it is ``dtype`` already."""
    with _DTYPE:
        if torch.get_default_dtype() == dtype:
            yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Parameters and stored buffers in ``dtype``. Computed buffers, such as rotary frequencies, keep theirs."""
    stored = model.state_dict(keep_vars=True)
    with torch.no_grad():
        others = [p for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
        replace_parameters(model, {id(p): nn.Parameter(p.to(dtype), requires_grad=p.requires_grad) for p in others})
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                is_stored = (f"{prefix}.{name}" if prefix else name) in stored
                if buffer is not None and is_stored and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    model.config.dtype = dtype
