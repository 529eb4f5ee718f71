"""LoRA over quantized weights against LoRA over dense ones: ``python -m benchmarks.qlora``, alone on the machine.

Trains adapters of all linear layers of doclm (or SmolLM2) on one part of doclm's validation text, and measures the loss
on another part before and after. Every row runs in a process of its own, so that its peak of memory is its own. "nf4"
is bitsandbytes on the CPU, where it can be imported (PYTHONPATH may name a folder that has it).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor import HqqConfig
from hqqtensor.diagnostics.language import next_token_logits, token_windows

DOCLM = Path(__file__).parents[1] / "tests" / "assets" / "doclm"
ROWS = ("dense", "8", "4", "3", "2", "4+error", "3+error", "2+error", "nf4")
"""Bits of the base; "+error": adapters begin with ``initialize_lora_from_error``."""


def directory_of(name: str) -> Path:
    """The dense directory of "doclm" or "smollm"."""
    if name == "doclm":
        return DOCLM
    from hqqtensor.demo.models import smollm_dir

    return smollm_dir()


def base_model(row: str, directory: Path) -> Any:
    """The model with the weights of ``row`` and untrained adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from hqqtensor.integrations.peft import initialize_lora_from_error

    torch.manual_seed(0)
    bits, _, correction = row.partition("+")
    quantization: Any = None
    if bits == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    elif bits != "dense":
        quantization = HqqConfig(int(bits), 64)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=quantization)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if correction:
        initialize_lora_from_error(model, directory)
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean of -log p of each token of ``windows`` but the first of each."""
    model.eval()
    losses = []
    for window in windows:
        logits = next_token_logits(model, window[None])
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
    return statistics.fmean(losses)


def measure(row: str, name: str, steps: int, test_windows: int, context: int = 256, batch: int = 4) -> dict[str, Any]:
    """Losses in nats a token, median seconds of a step, peak of memory of this process in MB."""
    from transformers import AutoTokenizer

    directory = directory_of(name)
    windows = token_windows(AutoTokenizer.from_pretrained(directory), (DOCLM / "valid.txt").read_text(), context)
    test, train = windows[:test_windows], windows[test_windows:]
    model = base_model(row, directory)
    before = held_out_loss(model, test)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    order = torch.Generator().manual_seed(1)
    model.train()
    seconds = []
    for _ in range(steps):
        ids = train[torch.randint(len(train), (batch,), generator=order)]
        begin = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
    after = held_out_loss(model, test)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    step = statistics.median(seconds) if seconds else 0.0
    return {"row": row, "before": before, "after": after, "step_seconds": step, "peak_mb": peak}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("doclm", "smollm"), default="doclm")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--test-windows", type=int, default=60, help="held-out windows of 256 tokens")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}, joined by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(measure(args.only, args.model, args.steps, args.test_windows)))
        return
    rows = args.rows.split(",")
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        parser.error(f"--rows: {', '.join(unknown)} not known; there are {', '.join(ROWS)}")
    results = []
    options = ["--model", args.model, "--steps", str(args.steps), "--test-windows", str(args.test_windows)]
    for row in rows:
        command = [sys.executable, "-m", "benchmarks.qlora", "--only", row, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            results.append({"row": row, "error": last})
        else:
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{args.model}, {args.steps} steps of 4 x 256 tokens, rank 16, {args.test_windows} held-out windows")
    print("| base | held-out loss before | after | a step | peak memory |\n| --- | --- | --- | --- | --- |")
    for r in results:
        if "error" in r:
            print(f"| {r['row']} | did not run: {r['error']} |")
        else:
            loss = f"{r['before']:.4f} | {r['after']:.4f}"
            print(f"| {r['row']} | {loss} | {r['step_seconds']:.2f} s | {r['peak_mb']:.0f} MB |")


if __name__ == "__main__":
    main()
