"""``python -m benchmarks.answers``: a chat model's answers at each width side by side, for people to read.

And how far greedy continuations agree with the dense model's: 64 tokens after each of 50 beginnings of news articles.
``--json FILE`` writes what docs/answers.md is made from.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import ours, texts
from hqqtensor import HqqConfig, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.calibration.data import batches_of
from hqqtensor.demo.chat import answer
from hqqtensor.demo.models import CACHE, load_smollm
from hqqtensor.diagnostics import model_size

QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Name three animals that live in the forest.",
    "What is photosynthesis?",
    "Give me a tip for sleeping better.",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "Why should I drink water?",
)
SETTINGS: dict[str, tuple[HqqConfig, bool]] = {
    "4 bits": (HqqConfig(4, embedding_nbits=8), False),
    "3 bits": (HqqConfig(3, embedding_nbits=8), False),
    "2 bits, own text": (HqqConfig(2, 16, embedding_nbits=8, **ours.META), True),
}
"""Settings, and whether the model is calibrated on text that it writes itself."""
BEGINNINGS, PROMPT, CONTINUATION, ANSWER = 50, 32, 64, 60


@torch.no_grad()
def continuations(model: Any, prompts: Tensor) -> Tensor:
    """The greedy continuations, ``[prompts, CONTINUATION]``; an end of text does not end them."""
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=CONTINUATION,
        min_new_tokens=CONTINUATION, pad_token_id=0, top_p=None, top_k=None, temperature=None,
    )  # fmt: skip
    return out[:, prompts.shape[1] :]


def agreement(dense: Tensor, other: Tensor) -> dict[str, float]:
    """same: share of continuations that are equal; until: share of tokens before the first that differs."""
    equal = (dense == other).to(torch.int64)
    return {"same": equal.all(1).double().mean().item(), "until": equal.cumprod(1).double().mean().item()}


def quantized(dense: nn.Module, name: str, written: list[Any]) -> nn.Module:
    config, is_calibrated = SETTINGS[name]
    model = copy.deepcopy(dense)
    quantize_(model, config, calibration=calibrate(dense, written) if is_calibrated else None)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="e.g. docs/data/answers.json")
    args = parser.parse_args()
    dense, tokenizer = load_smollm(torch.bfloat16)
    lines = [line for line in texts.news(CACHE).splitlines() if len(line) > 400][:BEGINNINGS]
    prompts = torch.stack([torch.tensor(tokenizer(line)["input_ids"][:PROMPT]) for line in lines])
    reference = continuations(dense, prompts)
    written = batches_of("self", dense)
    columns: dict[str, Any] = {}
    for name in ("dense", *SETTINGS):
        model = dense if name == "dense" else quantized(dense, name, written)
        size = model_size(model)
        columns[name] = {
            "MB": size.nbytes / 1e6,
            **agreement(reference, reference if name == "dense" else continuations(model, prompts)),
            "answers": [answer(model, tokenizer, question, ANSWER)[0] for question in QUESTIONS],
        }
        print(f"{name}: {columns[name]['MB']:.0f} MB, {columns[name]['until']:.1%} until they differ", flush=True)
        for question, text in zip(QUESTIONS, columns[name]["answers"], strict=True):
            print(f"  {question}\n    {text}", flush=True)
    if args.json:
        data = {"date": time.strftime("%Y-%m-%d"), "questions": QUESTIONS, "columns": columns}
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
