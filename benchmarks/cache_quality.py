"""``python -m benchmarks.cache_quality``: what a quantized cache of keys and values costs in quality, on SmolLM2.

The weights have 4 bits (default settings). For each length a text is read, and the next tokens are predicted after it:
by the dense model, by the quantized one with an exact cache, and by the quantized one with each cache. Reported is how
far the KL divergence to the dense model rises over that of the weights alone, in percent of it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from benchmarks.quality.statistics import mean_interval, ratio_interval
from benchmarks.quality.texts import documentation, wikipedia
from benchmarks.timing import machine, write_json
from hqqtensor import HqqConfig, quantize_
from hqqtensor.demo.models import load_smollm
from hqqtensor.diagnostics.table import text_table
from hqqtensor.integrations.transformers.cache import HqqQuantizedCache


class Setting(NamedTuple):
    """Arguments of ``HqqQuantizedCache``."""

    nbits: int
    axis_key: int = 0
    axis_value: int = 1
    rotation: str | None = None
    residual_length: int = 128
    q_group_size: int = 64

    def __str__(self) -> str:
        text = f"{self.nbits} bits, keys over {('tokens', 'channels')[self.axis_key]}"
        text += f", values over {('tokens', 'channels')[self.axis_value]}"
        text += f", rotated: {self.rotation}" if self.rotation else ""
        text += f", groups of {self.q_group_size}" if self.q_group_size != 64 else ""
        return text + (f", window {self.residual_length}" if self.residual_length != 128 else "")


def settings(widths: list[int]) -> list[Setting]:
    """The defaults, rotation, axes, the window and the groups, one changed at a time but for rotation and axes."""
    each = []
    for nbits in widths:
        for axes in ((0, 1), (1, 1), (0, 0)):
            each += [Setting(nbits, *axes, rotation) for rotation in (None, "keys", "both")]
        each += [
            Setting(nbits, residual_length=0),
            Setting(nbits, residual_length=512),
            Setting(nbits, q_group_size=32),
        ]
    return each


@torch.no_grad()
def read(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[1, heads, T, D]`` of each layer for tokens ``[1, T]``."""
    cache = DynamicCache(config=model.config)
    model.model(ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def after(model: Any, cache: Any, states: list[tuple[Tensor, Tensor]], ids: Tensor) -> Tensor:
    """Log probabilities ``[tokens, vocabulary]`` that the model gives after the states of a text, for tokens that
    follow."""
    for i, (keys, values) in enumerate(states):
        cache.update(keys, values, i)
    return model(ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """The mean over tokens of KL(p, q)."""
    return float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean())


def windows(text: Tensor, length: int, count: int) -> Iterator[Tensor]:
    """``count`` pieces of the text, ``[1, length]``, that begin at equal distances."""
    step = (text.shape[1] - length) // max(count - 1, 1)
    for i in range(count):
        yield text[:, i * step : i * step + length]


def measure(dense: Any, quantized: Any, ids: Tensor, tokens: int, each: list[Setting]) -> dict[str, float]:
    """KL to the dense model, of the weights alone and with every cache, for the last ``tokens`` of ``ids`` ``[1,
    T]``."""
    text, rest, config = ids[:, :-tokens], ids[:, -tokens:], quantized.config
    log_p = after(dense, DynamicCache(config=config), read(dense, text), rest)
    states = read(quantized, text)
    out = {"weights": divergence(log_p, after(quantized, DynamicCache(config=config), states, rest))}
    for setting in each:
        cache = HqqQuantizedCache(config, **setting._asdict())
        out[str(setting)] = divergence(log_p, after(quantized, cache, states, rest))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="tokens, at most 8192")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--windows", type=int, default=4, help="pieces of the text for each length")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are predicted behind each piece")
    parser.add_argument("--text", type=Path, help="a text file (default: Wikipedia articles, from the package gensim)")
    parser.add_argument("--docs", action="store_true", help="the held-out text of Python's documentation instead")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    dense, tokenizer = load_smollm(torch.float32)
    quantized, _ = load_smollm(torch.float32)
    quantize_(quantized, HqqConfig(4))
    if args.text is not None:
        text = args.text.read_text(encoding="utf-8")
    else:
        text = documentation() if args.docs else wikipedia(Path("~/.cache/hqqtensor").expanduser())
    ids = tokenizer(text, return_tensors="pt").input_ids
    each, figures = settings(args.bits), {}
    for length in args.lengths:
        runs = [measure(dense, quantized, piece, args.tokens, each) for piece in windows(ids, length, args.windows)]
        weights = [run["weights"] for run in runs]
        mean, low, high = mean_interval(weights)
        rises = {
            name: [100 * (ratio - 1) for ratio in ratio_interval([run[name] for run in runs], weights)]
            for name in map(str, each)
        }
        figures[length] = {"weights": mean, "low": low, "high": high, "rise_percent": rises}
        print(f"{length} tokens: KL of the weights {mean:.4f} ({low:.4f} to {high:.4f})", flush=True)

    def cell(length: int, name: str) -> str:
        rise, low, high = figures[length]["rise_percent"][name]
        return f"{rise:+.1f} % ({low:+.1f} to {high:+.1f})"

    rows = [[name, *(cell(length, name) for length in args.lengths)] for name in map(str, each)]
    print(text_table(["cache", *(f"{n} tokens" for n in args.lengths)], rows))
    write_json(args.json, {"machine": machine(), "figures": figures})


if __name__ == "__main__":
    main()
