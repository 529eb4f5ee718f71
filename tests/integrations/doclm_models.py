"""The model of these tests, and what they ask of it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hqqtensor import HQQTensor

DOCLM = str(Path(__file__).parents[1] / "assets" / "doclm")
PLAIN = ("--group-size", "64", "--embeddings", "none")
"""Settings of the command line that vLLM and the hqq library can read."""
IDS = torch.arange(12)[None]


def load(directory: Any = DOCLM, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        type(t) is type(second[name]) and torch.equal(t, second[name]) for name, t in first.items()
    )


def quantized(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, HQQTensor)]
