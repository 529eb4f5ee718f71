"""AutoRound (PyPI auto-round, arXiv 2309.05516) on the CPU: rounding learned block by block, groups of 64, asymmetric.

It is given the text that methods may calibrate on. Iterations are fewer than its default of 200, so that a model takes
minutes: what its own "light" recipe uses.
"""

import copy
import importlib.util
from typing import Any

import torch
from torch import nn

from benchmarks.quality.method import Method, affine_bits, replace
from benchmarks.quality.task import LanguageTask, Task, smollm_tokenizer
from hqqtensor import demo

ITERATIONS, BATCH = 50, 4


def _quantize(model: nn.Module, task: Task, nbits: int) -> float:
    from auto_round import AutoRound  # changes torch and transformers when it is imported

    if not isinstance(task, LanguageTask):
        raise TypeError("AutoRound is run on language models")
    tokenizer: Any = smollm_tokenizer() if task.name == "SmolLM2" else demo.load_doclm()[1]
    rows = torch.cat([batch["input_ids"] for batch in task.tuning])[:64]
    data = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones_like(row).unsqueeze(0)} for row in rows]
    tuned = AutoRound(
        copy.deepcopy(task.model), tokenizer, scheme="W4A16", bits=nbits, group_size=64, sym=False, dataset=data,
        nsamples=len(rows), seqlen=rows.shape[1], batch_size=BATCH, iters=ITERATIONS, device_map="cpu",
        # In bfloat16 as its users have it, but where this processor would take minutes a block for it.
        amp=torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    )  # fmt: skip
    rounded, _ = tuned.quantize()
    bits = 0.0
    for name in task.layers:
        layer = model.get_submodule(name)
        replace(layer, rounded.get_submodule(name).weight.detach().to(layer.weight.dtype))
        bits += affine_bits(layer.weight, nbits, 64, metadata=16 + nbits)
    return bits


def methods() -> list[Method]:
    if importlib.util.find_spec("auto_round") is None:
        raise ImportError("No module named 'auto_round'")
    return [Method(f"AutoRound {b}-bit g64", b, lambda m, t, b=b: _quantize(m, t, b), data="text") for b in (4, 3, 2)]
