"""``python -m benchmarks.answers``: a chat model's answers at each width side by side, for people to read.

SmolLM2 answers 50 questions greedily in float32, 64 tokens at most, dense and quantized. ``--json`` writes what
docs/answers.md is made from: the answers to the first ten, and how far all of them agree with the dense model's. Each
model's answers are kept under ``--cache``; only those that are not there are computed.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import ours
from benchmarks.quality.task import Task, smollm, smollm_tokenizer
from hqqtensor import HqqConfig, dequantize_, quantize_
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
    "What do bees make?",
    "How many days has a week?",
    "Explain what a computer is to a child.",
    "Which planet is the largest?",
    "Tell me a story about a lost dog.",
    "How does a bicycle stay upright?",
    "What can I cook with rice and tomatoes?",
    "What is the opposite of hot?",
    "Why do leaves fall in autumn?",
    "Give me a name for a black cat.",
    "What is a democracy?",
    "How do I say thank you to a teacher?",
    "What is the boiling point of water?",
    "Describe a mountain in one sentence.",
    "Why is exercise good for me?",
    "What is the difference between a lake and a river?",
    "How can I save money?",
    "Write a polite letter that cancels a meeting.",
    "What is a noun?",
    "Who was Albert Einstein?",
    "How do birds fly?",
    "What should I pack for a week at the beach?",
    "What is seven times eight?",
    "Why do people dream?",
    "Give me two ideas for a birthday present.",
    "What is the moon made of?",
    "How do I clean a window?",
    "What does a doctor do?",
    "Write a sentence with the word winter.",
    "How is bread made?",
    "What are the colors of the rainbow?",
    "How can I learn a language faster?",
    "What is gravity?",
    "Suggest a title for a book about trains.",
    "Why do cats purr?",
    "What is a healthy breakfast?",
    "How do I plant a tree?",
    "What is the internet?",
    "Where do penguins live?",
    "How can I be a better listener?",
)
SHOWN, TOKENS = 10, 64
SETTINGS: dict[str, tuple[HqqConfig, str]] = {
    "4 bits": (HqqConfig(4, embedding_nbits=8), ""),
    "3 bits, own text": (HqqConfig(3, embedding_nbits=8), "self"),
    "2 bits, mixed text": (HqqConfig(2, 16, embedding_nbits=8, **ours.META), "49152"),
}
"""Settings by the column's name, and what the model is calibrated on (``benchmarks.quality.ours``)."""


def prompts(tokenizer: Any, questions: tuple[str, ...]) -> dict[str, Tensor]:
    """The questions in the chat's form, padded on the left to one length."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [[{"role": "user", "content": question}] for question in questions]
    return dict(
        tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
    )


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], end: int, tokens: int = TOKENS) -> Tensor:
    """The greedy answers, ``[prompts, tokens]``; behind the ``end`` of an answer all tokens are ``end``."""
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=end, pad_token_id=end, top_p=None, top_k=None,
        temperature=None,
    )  # fmt: skip
    new = out[:, inputs["input_ids"].shape[1] :]
    return torch.nn.functional.pad(new, (0, tokens - new.shape[1]), value=end)


@torch.no_grad()
def choices(model: Any, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    """The most probable token at each place of ``answers``, given what stands before it there; of the same shape."""
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, answers.shape[1]), value=1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    kept = answers.shape[1] + 1
    logits = model(ids, attention_mask=mask, position_ids=places, logits_to_keep=kept).logits
    return logits[:, :-1].argmax(-1)


def agreement(dense: Tensor, other: Tensor, forced: Tensor, end: int) -> dict[str, float]:
    """Over the tokens of the dense model's answers, the first ``end`` of each included.

    forced: share of tokens that the other model chooses too, given the dense model's answer up to there (``choices``).
    first: share of answers whose first tokens are equal. until: share of tokens before the first that differs. place by
    place: share of tokens that stand at the same place of the other answer. same: share of answers that are equal.
    """
    counted = (dense == end).to(torch.int64).cumsum(1) - (dense == end).to(torch.int64) == 0
    equal = (dense == other) & counted
    until = (equal | ~counted).to(torch.int64).cumprod(1).bool() & counted
    return {
        "forced": (((dense == forced) & counted).sum() / counted.sum()).item(),
        "same": (until == counted).all(1).double().mean().item(),
        "until": (until.sum() / counted.sum()).item(),
        "place by place": (equal.sum() / counted.sum()).item(),
        "first": equal[:, 0].double().mean().item(),
    }


def column(
    name: str, task: Task, inputs: dict[str, Tensor], end: int, dense: Tensor | None, cache: Path
) -> dict[str, Any]:
    """What the model of a column answers, as token ids, and its size. A calibration that was stopped goes on."""
    model: Any = copy.deepcopy(task.model)
    if name in SETTINGS:
        config, data = SETTINGS[name]
        folder = cache / f"unfinished-answers-{config.nbits}" if data else None
        quantize_(model, config, calibration=ours.batches(task, data) if data else None, resume=folder)
    elif name == "dense, bfloat16":
        model.to(torch.bfloat16)
    size = model_size(model).nbytes / (2 if name == "dense" else 1)  # the dense weights came as bfloat16
    dequantize_(model)  # the same weights, quicker for 50 answers at a time
    ids = greedy(model, inputs, end)
    forced = choices(model, inputs, ids if dense is None else dense)
    return {"MB": size / 1e6, "ids": ids.tolist(), "forced": forced.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".quality"), help="folder of results (default .quality)")
    parser.add_argument("--only", default="", help="compute only columns whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="e.g. docs/data/answers.json")
    args = parser.parse_args()
    ours.CACHE = args.cache
    args.cache.mkdir(parents=True, exist_ok=True)
    task, tokenizer = smollm(), smollm_tokenizer()
    inputs, end = prompts(tokenizer, QUESTIONS), tokenizer.eos_token_id
    ids: dict[str, Tensor] = {}
    columns: dict[str, Any] = {}
    for name in ("dense", "dense, bfloat16", *SETTINGS):
        file = args.cache / f"answers-{name.replace(',', '').replace(' ', '-')}.json"
        if not file.is_file() and args.only in name:
            file.write_text(json.dumps(column(name, task, inputs, end, ids.get("dense"), args.cache)))
        if not file.is_file() and name == "dense":
            parser.error("the dense model's answers are needed first: --only dense")
        if file.is_file():
            found = json.loads(file.read_text())
            ids[name] = torch.tensor(found["ids"])
            columns[name] = {"MB": found["MB"]}
            if name != "dense":
                columns[name] |= agreement(ids["dense"], ids[name], torch.tensor(found["forced"]), end)
            print(name, {key: round(value, 4) for key, value in columns[name].items()}, flush=True)
            texts = tokenizer.batch_decode(ids[name][:SHOWN], skip_special_tokens=True)
            columns[name]["answers"] = [" ".join(text.split()) for text in texts]
            for question, text in zip(QUESTIONS, columns[name]["answers"], strict=False):
                print(f"  {question}\n    {text}", flush=True)
    if args.json:
        data = {"date": time.strftime("%Y-%m-%d"), "questions": QUESTIONS[:SHOWN], "columns": columns}
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
