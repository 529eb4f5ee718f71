"""``python -m benchmarks.calibration_depth``: time of calibration by depth, and beside a dense pass over its tokens.

Llamas of SmolLM2's widths with random weights and 8, 16 and 32 layers; then, with ``--smollm``, SmolLM2 itself on
8,192 random tokens. Memory is the process's peak above what it held with the dense model.
"""

import argparse
import gc
import threading
import time
from typing import Any

import psutil
import torch
from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.diagnostics.table import text_table

TOKENS, CONTEXT, BATCH = 2048, 512, 4


class Peak:
    """The largest resident memory of this process while the block runs, above what it was before, in bytes."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.process, self.stopped, self.bytes = psutil.Process(), threading.Event(), 0
        self.before = self.process.memory_info().rss
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.05):
            self.bytes = max(self.bytes, self.process.memory_info().rss - self.before)

    def __exit__(self, *_error: object) -> None:
        self.stopped.set()
        self.watcher.join()


def random_llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def measure(model: Any, tokens: int) -> tuple[float, float, int]:
    """Seconds of a dense pass over the tokens, seconds of ``quantize_(quality="good")`` on them, its peak memory."""
    ids = torch.randint(0, model.config.vocab_size, (tokens // CONTEXT, CONTEXT), generator=torch.manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(BATCH)]
    with torch.no_grad():
        model(**batches[0])
        started = time.perf_counter()
        for batch in batches:
            model(**batch)
    dense = time.perf_counter() - started
    with Peak() as peak:
        started = time.perf_counter()
        quantize_(model, HqqConfig(3), calibration=batches)
        seconds = time.perf_counter() - started
    return dense, seconds, peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm", action="store_true")
    args = parser.parse_args()
    rows = []
    for layers in (8, 16, 32):
        dense, seconds, peak = measure(random_llama(layers), TOKENS)
        rows.append((f"{layers} layers, {TOKENS} tokens", layers, dense, seconds, peak))
    if args.smollm:
        from hqqtensor.demo.models import load_smollm

        dense, seconds, peak = measure(load_smollm()[0], 8192)
        rows.append(("SmolLM2, 8192 tokens", 30, dense, seconds, peak))
    cells = [
        (name, f"{dense:.1f} s", f"{seconds:.1f} s", f"{seconds / dense:.1f} x", f"{seconds / layers:.2f} s",
         f"{peak / 1e6:.0f} MB")
        for name, layers, dense, seconds, peak in rows
    ]  # fmt: skip
    print(text_table(("model", "dense pass", "calibrated", "over the pass", "a layer", "peak memory"), cells))


if __name__ == "__main__":
    main()
