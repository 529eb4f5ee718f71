"""The demo's first part: a chat model at 4, 3 and 2 bits, with the same question answered by each."""

import copy
import time
from typing import Any

import torch

from hqqtensor import HqqConfig, prepare_for_generation_, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.calibration.data import batches_of
from hqqtensor.cli.output import print_table
from hqqtensor.demo.models import DOCLM, load_smollm
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.language import compare_language_models, token_windows
from hqqtensor.diagnostics.table import megabytes

QUESTION = "Why is the sky blue?"
SETTINGS = (
    ("4 bits", HqqConfig(4, embedding_nbits=8), False),
    ("3 bits", HqqConfig(3, embedding_nbits=8), False),
    ("2 bits", HqqConfig(2, 16, quant_scale=True, quant_zero=True, meta_nbits=4, embedding_nbits=8), True),
)
"""Name, settings, and whether the model is calibrated on text that it writes itself."""
CALIBRATION_TOKENS, TOKENS, CONTEXT, ANSWER = 2048, 2048, 512, 64


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str = QUESTION, tokens: int = ANSWER) -> tuple[str, float]:
    """The model's greedy answer to a question, and tokens a second."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    started = time.perf_counter()
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id, top_p=None, top_k=None,
        temperature=None,
    )  # fmt: skip
    new = out[0, inputs["input_ids"].shape[1] :]
    speed = len(new) / (time.perf_counter() - started)
    return " ".join(tokenizer.decode(new, skip_special_tokens=True).split()), speed


def show_chat() -> None:
    """Print the table of SmolLM2 and its answers."""
    dense, tokenizer = load_smollm(torch.bfloat16)
    windows = token_windows(tokenizer, (DOCLM / "valid.txt").read_text(encoding="utf-8"), CONTEXT)[: TOKENS // CONTEXT]
    started = time.perf_counter()
    batches = batches_of("self", dense, tokens=CALIBRATION_TOKENS)
    print(f"SmolLM2 wrote {CALIBRATION_TOKENS} tokens to calibrate on in {time.perf_counter() - started:.0f} s")
    calibration = calibrate(dense, batches)
    size = model_size(dense)
    text, speed = answer(dense, tokenizer)
    rows = [("dense bf16", megabytes(size.nbytes), "16.00", "0", "", f"{speed:.0f}", "")]
    answers = [("dense", text)]
    for name, config, is_calibrated in SETTINGS:
        model = copy.deepcopy(dense)
        started = time.perf_counter()
        quantize_(model, config, calibration=calibration if is_calibrated else None)
        seconds = time.perf_counter() - started
        size, text_and_speed = model_size(model), answer(prepare_for_generation_(model), tokenizer)
        r = compare_language_models(dense, model, windows)
        rows.append(
            (
                f"{name}{', calibrated' if is_calibrated else ''}", megabytes(size.nbytes), f"{_bits(model):.2f}",
                f"{r.kl:.3f}", f"{r.top1_agreement:.0%}", f"{text_and_speed[1]:.0f}", f"{seconds:.0f} s",
            )
        )  # fmt: skip
        answers.append((name, text_and_speed[0]))
    header = ("SmolLM2-135M-Instruct", "size", "bits/weight", "KL", "same next token", "tokens/s", "time")
    print_table(header, rows, "embedding and output layer at 8 bits")
    print(f"\n{QUESTION}")
    for name, text in answers:
        print(f"{name:>7}: {text}")


def _bits(model: Any) -> float:
    """Stored bits of a weight of the linear layers within the blocks."""
    size = model_size(model.model.layers)
    return 8 * size.quantized_nbytes / size.quantized_weights
