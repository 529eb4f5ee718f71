"""LoRA over quantized weights against LoRA over dense ones: ``python -m benchmarks.qlora``, alone on the machine.

Trains adapters of all linear layers of doclm or SmolLM2 on one part of doclm's validation text, and measures the loss
on another part, 60 windows that nothing else sees. "qwen3-moe" is two layers of Qwen3-30B-A3B with random weights, for
memory and the time of a step. Every row runs in a process of its own and is written to a file of its own; the same call
goes on after the rows that are there. "nf4" is bitsandbytes on the CPU, where it can be imported (PYTHONPATH may name a
folder that has it).

    python -m benchmarks.qlora --model smollm --steps 30,120 --ranks 8,32
    python -m benchmarks.qlora --model qwen3-moe --steps 5 --rows dense,4
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_over, resident
from benchmarks.qlora_models import BASES, HELD_OUT, MODELS, MOE, OPTIONS, adapted, check_row, text_of
from hqqtensor.calibration import train_scales
from hqqtensor.diagnostics.language import next_token_logits

ROWS = ("dense", "8", "4", "4+default", "nf4", "3", "3+default", "3+default+calibrated", "3+default+calibrated+seen",
        "2", "2+error", "2+seen", "2+rounds", "2+seen+rounds", "2+default", "2+default+calibrated+seen")  # fmt: skip
CONTEXT, BATCH = 256, 4


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean of -log p of each token of ``windows`` but the first of each."""
    model.eval()
    losses = []
    for window in windows:
        logits = next_token_logits(model, window[None])
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
    return statistics.fmean(losses)


def train(model: nn.Module, windows: Tensor, steps: int) -> list[float]:
    """Seconds of each of ``steps`` steps of ``BATCH`` windows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    order = torch.Generator().manual_seed(1)
    model.train()
    seconds = []
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (BATCH,), generator=order)]
        begin = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(row: str, name: str, steps: int, rank: int, test_windows: int) -> dict[str, Any]:
    """Losses in nats a token, median seconds of a step, bytes of the weights and of the process at most in training."""
    text = text_of(name, CONTEXT)
    begin = time.perf_counter()
    model, weights = adapted(row, name, rank, text)
    prepared = time.perf_counter() - begin
    held_out = text.held_out[:test_windows]
    before = held_out_loss(model, held_out)
    seconds: list[float] = []
    with train_scales(model) if row.endswith("+scales") else contextlib.nullcontext():
        start = resident()
        more = peak_over(lambda: seconds.extend(train(model, text.train, steps)))
    after = held_out_loss(model, held_out)
    step = statistics.median(seconds) if seconds else 0.0
    return {
        "row": row, "model": name, "steps": steps, "rank": rank, "before": before, "after": after, "step_seconds": step,
        "weight_bytes": weights, "peak_bytes": None if more is None else start + more, "added_bytes": more,
        "prepared_seconds": prepared,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[str]:
    """The rows of one model, number of steps and rank."""
    after = {r["row"]: r["after"] for r in results if "error" not in r}
    dense = after.get("dense")
    head = ["base", "weights", "held-out loss before", "after", "over dense LoRA", "of the plain base's gap closed"]
    lines = [" | ".join(["", *head, "peak in training", "a step", ""]).strip(), "|" + " --- |" * 8]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['row']} | did not run: {r['error']} |")
            continue
        over = "" if dense is None else f"{100 * (r['after'] / dense - 1):+.2f} %"
        base, *options = r["row"].split("+")
        plain = after.get(base) if options else None
        closed = "" if dense is None or plain is None else f"{100 * (plain - r['after']) / (plain - dense):.0f} %"
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f} MB"
        loss = f"{r['before']:.4f} | {r['after']:.4f}"
        sizes = f"{r['weight_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {r['row']} | {sizes} | {loss} | {over} | {closed} | {peak} | {r['step_seconds']:.2f} s |")
    return lines


def numbers(text: str) -> list[int]:
    """Whole numbers of at least 0, joined by commas."""
    values = [int(part) for part in text.split(",")]
    if any(value < 0 for value in values):
        raise ValueError
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = "; ".join(f"+{name}: {text}" for name, text in OPTIONS.items())
    parser.add_argument("--model", choices=MODELS, default="doclm")
    parser.add_argument("--steps", type=numbers, default=[120], help="steps of 4 windows; several joined by commas")
    parser.add_argument("--ranks", type=numbers, default=[16], help="ranks of the adapters, joined by commas")
    parser.add_argument("--test-windows", type=int, default=HELD_OUT, help=f"held-out windows, at most {HELD_OUT}")
    parser.add_argument("--rows", help=f"joined by commas, each of {', '.join(BASES)} and options. {options}")
    parser.add_argument(
        "--results", type=Path, default=Path("qlora-results"), help="folder of a JSON file for each row"
    )
    parser.add_argument("--again", action="store_true", help="run rows that have a file as well")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not 1 <= args.test_windows <= HELD_OUT:
        parser.error(f"--test-windows: 1 to {HELD_OUT}, got {args.test_windows}")
    if args.only:
        print(json.dumps(measure(args.only, args.model, args.steps[0], args.ranks[0], args.test_windows)))
        return
    rows = args.rows.split(",") if args.rows else ["dense", "4"] if args.model == MOE else list(ROWS)
    try:
        for row in rows:
            check_row(row)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    args.results.mkdir(parents=True, exist_ok=True)
    everything = []
    for steps in args.steps:
        for rank in args.ranks:
            results = [
                run_row(row, args.model, steps, rank, args.test_windows, args.results, args.again) for row in rows
            ]
            everything += results
            if not args.json:
                shape = f"{steps} steps of {BATCH} x {CONTEXT} tokens, rank {rank}"
                print(f"\n{args.model}, {shape}, {args.test_windows} held-out windows\n")
                print("\n".join(table(results)), flush=True)
    if args.json:
        print(json.dumps(everything, indent=1))


def run_row(row: str, model: str, steps: int, rank: int, windows: int, folder: Path, again: bool) -> dict[str, Any]:
    """What ``measure`` gives in a process of its own, from its file where there is one; a failure is not kept."""
    file = folder / f"{model}-{steps}-steps-rank-{rank}-{windows}-windows-{row}.json"
    if file.is_file() and not again:
        return json.loads(file.read_text())
    print(f"{file.stem} ...", file=sys.stderr, flush=True)
    options = ["--model", model, "--steps", str(steps), "--ranks", str(rank), "--test-windows", str(windows)]
    command = [sys.executable, "-m", "benchmarks.qlora", "--only", row, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"row": row, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(file)
    return result


if __name__ == "__main__":
    main()
