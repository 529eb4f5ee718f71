"""``python -m benchmarks.cpu_decode``: tokens a second and time to first token of a Llama of 1B shapes.

Ours at 4 and 8 bits in groups of 64 runs in transformers, prompts eagerly, single tokens through torch.compile with a
static cache and attention as plain products, against the dense model run alike and against llama.cpp on the same
random weights quantized by ggml to Q4_0 and Q8_0 and written to GGUF. Both sides keep the same layers in the same
bits: the embedding, which is the output layer too, has 6 bits (Q6_K) beside 4-bit layers, as llama-quantize does it,
and 8 beside 8-bit ones. Their real bytes are printed. No side samples. Every model's logits are checked before
anything is timed, against those of the dense float32 model of its own dequantized weights. Contenders take turns of a
few tokens each. Needs about 14 GiB of memory; ``--no-fp32`` leaves the dense float32 model out of the timing (5 GB).
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks import aims
from benchmarks.contender import NotHere, WrongAnswer
from benchmarks.decode import gguf_file
from benchmarks.decode.llama_runner import LlamaRunner
from benchmarks.decode.torch_runner import TorchRunner
from benchmarks.decode.weights import llama_1b, quantized, random_weights
from benchmarks.ours import DTYPES
from benchmarks.timing import machine, write_json
from hqqtensor import HQQTensor
from hqqtensor.diagnostics.table import text_table

SETTLE = 2  # untimed tokens at the start of a turn
TURN = 8  # timed tokens of a turn


class Runner(Protocol):
    """A model with a key-value cache; ``nbytes`` of its weights."""

    name: str
    kind: str
    nbytes: int

    def prefill(self, tokens: list[int]) -> Tensor: ...

    def step(self, token: int) -> Tensor: ...

    def rewind(self, length: int) -> None: ...


class Answers:
    """Logits after a short prompt and after one more token, and how far a runner's may be from them."""

    def __init__(self, reference: Runner, vocab: int) -> None:
        generator = torch.manual_seed(1)
        *self.prompt, self.next = torch.randint(0, vocab, (17,), generator=generator).tolist()
        self.want = self.logits(reference)

    def logits(self, runner: Runner) -> Tensor:
        first = runner.prefill(self.prompt).float().clone()
        return torch.stack([first, runner.step(self.next).float().clone()])

    def check(self, runner: Runner, limit: float) -> float:
        """Relative error of the runner's logits; WrongAnswer over ``limit``."""
        error = ((self.logits(runner) - self.want).norm() / self.want.norm()).item()
        if not error <= limit:
            raise WrongAnswer(f"{runner.name}: logits off by {error:.2e} of their norm, at most {limit} was expected")
        print(f"{runner.name}: logits within {error:.1e}, weights of {runner.nbytes / 1e6:.0f} MB", flush=True)
        return error


def ours(
    args: argparse.Namespace, config: LlamaConfig, weights: dict[str, Tensor], length: int
) -> Iterator[tuple[Runner, float]]:
    """Our models, each with the error of its logits."""
    for nbits in args.bits:
        for activation in ("float", "int8"):
            try:
                packed = quantized(weights, nbits, **({} if activation == "float" else {"activation": "int8"}))
            except NotHere as error:
                print(f"left out: {nbits}-bit with int8 activations ({error})")
                continue
            dense = {n: w.dequantize(torch.float32) if isinstance(w, HQQTensor) else w for n, w in packed.items()}
            answers = Answers(TorchRunner("", config, dense, torch.float32, length, False), config.vocab_size)
            del dense
            gc.collect()
            for dtype in args.dtypes:
                name = f"{nbits}-bit {'int8 ' if activation == 'int8' else ''}{dtype}"
                runner = TorchRunner(name, config, packed, DTYPES[dtype], length, args.compile)
                limit = 0.15 if activation == "int8" else 5e-2 if dtype == "bf16" else 1e-3
                yield runner, answers.check(runner, limit)


def llama_cpp(
    args: argparse.Namespace, config: LlamaConfig, weights: dict[str, Tensor], length: int
) -> Iterator[tuple[Runner, float]]:
    """llama.cpp's models, or nothing and a line that says why."""
    why = gguf_file.available()
    if why:
        print(f"left out: llama.cpp ({why})")
        return
    for nbits in args.bits:
        layers, embedding = gguf_file.TYPES[nbits]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{layers}.gguf"
            nbytes, dense = gguf_file.write_gguf(path, config, weights, nbits)
            runner = LlamaRunner(f"llama.cpp {layers}", path, nbytes, config.vocab_size, length)
        if embedding != layers:
            runner.name += f" ({embedding} embedding)"
        answers = Answers(TorchRunner("", config, dense, torch.float32, length, False), config.vocab_size)
        del dense
        gc.collect()
        yield runner, answers.check(runner, 0.1)


def decode_times(runners: list[Runner], prompt: list[int], seconds: float) -> dict[str, float]:
    """Median seconds a token after ``prompt``, in turns."""
    times: dict[str, list[float]] = {r.name: [] for r in runners}
    for runner in runners:
        runner.prefill(prompt)
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        for runner in runners:
            runner.rewind(len(prompt))
            for i in range(SETTLE + TURN):
                started = time.perf_counter()
                runner.step(100 + i)
                if i >= SETTLE:
                    times[runner.name].append(time.perf_counter() - started)
        turns += 1
    return {name: statistics.median(t) for name, t in times.items()}


def first_token_times(runners: list[Runner], prompt: list[int], rounds: int) -> dict[str, float]:
    """Median seconds from a prompt to its logits, in turns."""
    times: dict[str, list[float]] = {r.name: [] for r in runners}
    for turn in range(rounds + 1):
        for runner in runners:
            started = time.perf_counter()
            runner.prefill(prompt)
            if turn or rounds == 0:
                times[runner.name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims: at each width at least llama.cpp's tokens a second."""
    lines = []
    for nbits, peer in ((4, "llama.cpp Q4_0"), (8, "llama.cpp Q8_0")):
        theirs = next((r["tokens/s"] for r in rows if r["name"].startswith(peer)), None)
        for row in rows:
            if theirs and row["name"].startswith(f"{nbits}-bit"):
                ratio = row["tokens/s"] / theirs
                text = f"decode, {row['name']}: >= {peer}'s tokens a second"
                lines.append(aims.aim(text, f"{ratio:.2f} x", ratio >= 1))
    return lines


def profile(runner: Runner, prompt: list[int]) -> str:
    """Where the time of a few decoded tokens goes, by operator."""
    runner.prefill(prompt)
    runner.step(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        for i in range(TURN):
            runner.step(i)
    return profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    config = llama_1b(args.small)
    length = max(args.prompts) + SETTLE + TURN
    weights = random_weights(config)
    found = list(ours(args, config, weights, length))
    dense = TorchRunner("dense fp32", config, weights, torch.float32, length, args.compile)
    answers = Answers(dense, config.vocab_size)
    found.append((dense, 0.0))
    if args.no_fp32:
        found.pop()
    half = TorchRunner("dense bf16", config, weights, torch.bfloat16, length, args.compile)
    found.append((half, answers.check(half, 5e-2)))
    found += llama_cpp(args, config, weights, length)
    del dense
    gc.collect()
    runners = [runner for runner, _ in found]
    generator = torch.manual_seed(2)
    prompts = {n: torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in args.prompts}
    shortest = prompts[min(prompts)]
    decode = decode_times(runners, shortest, args.seconds)
    first = {n: first_token_times(runners, prompt, args.rounds) for n, prompt in prompts.items()}
    rows = []
    for runner, error in found:
        row = {"name": runner.name, "kind": runner.kind, "bytes": runner.nbytes, "error": error}
        row |= {"tokens/s": 1 / decode[runner.name], "weights GB/s": runner.nbytes / decode[runner.name] / 1e9}
        row |= {f"first token, {n}": first[n][runner.name] for n in prompts}
        rows.append(row)
    firsts = [f"first token, {n}" for n in prompts]
    table = [
        (
            r["name"],
            f"{r['bytes'] / 1e6:.0f}",
            f"{r['tokens/s']:.1f}",
            f"{r['weights GB/s']:.1f}",
            *(f"{r[f]:.2f}" for f in firsts),
        )
        for r in rows
    ]
    print(f"\nDecode after {len(shortest)} tokens; first token in seconds")
    print(text_table(("", "MB", "tokens/s", "weights GB/s", *firsts), table))
    lines = verdict(rows)
    aims.show(lines)
    if args.profile:
        for runner in runners:
            if runner.kind == "torch" and "bit" in runner.name:
                print(f"\n{runner.name}\n{profile(runner, shortest)}")
    return {"rows": rows, "verdict": lines, "decode after": len(shortest)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8], choices=[4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES), help="activations of ours")
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 512], help="lengths in tokens")
    parser.add_argument("--seconds", type=float, default=60, help="of decoding, all contenders together")
    parser.add_argument("--rounds", type=int, default=1, help="prompts of each length and contender, after a first one")
    parser.add_argument("--small", action="store_true", help="two small layers, to see that everything works")
    parser.add_argument("--no-fp32", action="store_true", help="leave out the dense float32 model")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run single tokens eagerly")
    parser.add_argument("--profile", action="store_true", help="print where the time of our tokens goes")
    args = parser.parse_args(argv)
    print(machine())
    with torch.no_grad():
        results = run_all(args)
    write_json(args.json, results)
    if args.plot:
        from benchmarks import plot

        plot.decode(results, args.plot)
    return results


if __name__ == "__main__":
    main()
