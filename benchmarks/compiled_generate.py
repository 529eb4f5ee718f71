"""``python -m benchmarks.compiled_generate``: what ``prepare_for_generation_(model, compile=True)`` takes, and gives.

A model of SmolLM2's sizes, of a family that has no description (StableLM), random weights of 4 bits. Reported are
seconds of the call in a process with an empty cache of torch.compile, in a second process, and tokens a second before
and after.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers

from benchmarks.timing import machine, write_json
from hqqtensor import HqqConfig, prepare_for_generation_, quantize_

SMOLLM = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
}  # fmt: skip


def rate(model: Any, prompt: int, tokens: int) -> float:
    """Tokens a second of greedy ``generate`` after a prompt, which is not counted."""
    ids = torch.arange(1, prompt + 1).unsqueeze(0)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times = []
    for count in (1, tokens + 1):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
        times.append(time.perf_counter() - start)
    return tokens / (times[1] - times[0])


def one_process(layers: int, tokens: int) -> dict[str, float]:
    """The figures of this process."""
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**{**SMOLLM, "num_hidden_layers": layers})
    model = transformers.StableLmForCausalLM(config).to(torch.bfloat16).eval()
    quantize_(model, HqqConfig(4))
    rate(model, 32, 4)
    before = rate(model, 32, tokens)
    start = time.perf_counter()
    prepare_for_generation_(model, compile=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before": before, "after": rate(model, 32, tokens), "other": rate(model, 300, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_process(args.layers, args.tokens)))
        return
    command = [sys.executable, "-m", "benchmarks.compiled_generate", "--one"]
    command += ["--layers", str(args.layers), "--tokens", str(args.tokens)]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        for which in ("first", "second"):
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures.append(json.loads(out.splitlines()[-1]))
            print(f"{which} process: {figures[-1]['seconds']:.1f} s to compile", end=", ")
            print(f"{figures[-1]['before']:.1f} tokens/s before, {figures[-1]['after']:.1f} after", end=", ")
            print(f"{figures[-1]['other']:.1f} after a prompt of 300", flush=True)
    write_json(args.json, {"machine": machine(), "first": figures[0], "second": figures[1]})


if __name__ == "__main__":
    main()
