"""``python -m benchmarks.generate``: tokens a second and time to first token, each side through its users' interface.

Ours and dense bf16 run in transformers' ``model.generate()``; ours after ``prepare_for_generation_`` and nothing else.
llama.cpp runs by its C interface on the same weights: SmolLM2 from the same Q4_1 file, the shapes of Llama-3.2-1B from
the same random weights quantized to Q4_0 beside our 4 bits in groups of 64 (the tied embedding has 6 bits on both
sides). The shapes of a 7B model have 32 layers that share the weights of one, which llama.cpp cannot do. All decode
greedily, take turns, and every prompt of a batch is the same. The last column counts the tokens that are those of the
first row: rounding in bf16 lets answers part.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.contender import NotHere
from benchmarks.decode import gguf_file
from benchmarks.decode.hf_runner import HfRunner, assemble
from benchmarks.decode.llama_runner import LlamaRunner
from benchmarks.decode.weights import llama_1b, llama_7b, quantized, random_weights
from benchmarks.timing import machine, write_json
from hqqtensor import cli as command_line
from hqqtensor.demo.models import smollm_dir, smollm_gguf
from hqqtensor.diagnostics.table import text_table
from hqqtensor.generation import prepare_for_generation_
from hqqtensor.integrations.transformers.cache import HqqQuantizedCache

MODELS = ("SmolLM2", "1B", "7B", "small")
Runner = HfRunner | LlamaRunner


def ours(args: argparse.Namespace, packed: Any, dense: Any) -> list[Runner]:
    """transformers' contenders. packed, dense: make the model."""
    model = prepare_for_generation_(packed())
    out: list[Runner] = [HfRunner("hqqtensor", "ours", model)]
    for nbits in args.packed_caches:
        make = functools.partial(HqqQuantizedCache, model.config, nbits)
        out.append(HfRunner(f"hqqtensor, {nbits}-bit cache", "ours", model, make))
    if args.plain:
        out.append(HfRunner("hqqtensor, not prepared", "ours", packed()))
    if args.dense:
        out.append(HfRunner("dense bf16", "dense", dense()))
    return out


def contenders(name: str, args: argparse.Namespace, stack: ExitStack) -> list[Runner]:
    """All sides of one model."""
    length, dtype = max(args.contexts) + args.new + 8, torch.bfloat16
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config: Any
    if name == "SmolLM2":
        path = smollm_gguf()
        command_line.main(["convert", str(path), str(folder / "packed")])

        def load(directory: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

        out = ours(args, lambda: load(folder / "packed"), lambda: load(smollm_dir()))
        config = out[0].model.config  # type: ignore[union-attr]
    else:
        config = llama_7b() if name == "7B" else llama_1b(name == "small")
        weights = random_weights(config, shared=name == "7B")
        packed = quantized(weights, 4)
        out = ours(args, lambda: assemble(config, packed, dtype), lambda: assemble(config, weights, dtype))
        if name == "7B":
            return out
        path = folder / "weights.gguf"
        if args.llama and gguf_file.available() is None:
            gguf_file.write_gguf(path, config, weights, 4)
    return [*out, *llama_cpp(path, config, args, length, stack)]


def llama_cpp(
    path: Path, config: LlamaConfig, args: argparse.Namespace, length: int, stack: ExitStack
) -> Iterator[Runner]:
    """llama.cpp with the caches that were asked for, or a line that says why not."""
    why = gguf_file.available() if args.llama else "--no-llama"
    if why:
        print(f"left out: llama.cpp ({why})")
        return
    for cache in args.llama_caches:
        name = "llama.cpp" if cache == "f16" else f"llama.cpp, {cache} cache"
        flash = cache != "f16" or args.flash
        runner = LlamaRunner(name, path, config.vocab_size, length, args.batch, flash, cache)
        stack.callback(runner.close)
        yield runner


def measure(runners: list[Runner], ids: torch.Tensor, new: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each runner: median seconds to the first token, and median tokens a second after it."""
    firsts: dict[str, list[float]] = {r.name: [] for r in runners}
    rates: dict[str, list[float]] = {r.name: [] for r in runners}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        for runner in runners:
            times, tokens[runner.name] = runner.generate(ids, new)
            if turn or rounds == 0:  # the first turn is a warm-up
                firsts[runner.name].append(times[0])
                rates[runner.name].append(len(ids) * (new - 1) / (times[-1] - times[0]))
    rows = []
    for runner in runners:
        row = {"name": runner.name, "kind": runner.kind, "MB": runner.nbytes / 1e6}
        row |= {"batch": len(ids), "context": ids.shape[1], "tokens/s": statistics.median(rates[runner.name])}
        rows.append(row | {"first token, s": statistics.median(firsts[runner.name]), "tokens": tokens[runner.name][0]})
    return rows


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    out = []
    for name in args.models:
        with ExitStack() as stack:
            runners = contenders(name, args, stack)
            vocab = 1024 if name == "small" else 32000
            for context in args.contexts:
                generator = torch.manual_seed(context)
                ids = torch.randint(10, vocab, (1, context), generator=generator).expand(args.batch, -1).contiguous()
                rows = measure(runners, ids, args.new, args.rounds)
                show(name, rows)
                out += [{"model": name, **{k: v for k, v in row.items() if k != "tokens"}} for row in rows]
            del runners
    return out


def show(model: str, rows: list[dict[str, Any]]) -> None:
    theirs = next((r for r in rows if r["kind"] == "llama.cpp"), None)
    lines = []
    for row in rows:
        speed, first = row["tokens/s"], row["first token, s"]
        same = sum(a == b for a, b in zip(row["tokens"], rows[0]["tokens"], strict=True))
        over = ["", ""]
        if theirs:
            over = [f"{speed / theirs['tokens/s']:.2f} x", f"{theirs['first token, s'] / first:.2f} x"]
        cells = (row["name"], f"{row['MB']:.0f}", f"{speed:.1f}", over[0], f"{first:.3f}", over[1])
        lines.append((*cells, f"{same}/{len(row['tokens'])}"))
    print(f"\n{model}, prompt of {rows[0]['context']} tokens, batch {rows[0]['batch']}; over: of llama.cpp's")
    header = ("", "MB", "tokens/s", "over", "first token, s", "over", "same tokens")
    print(text_table(header, lines), flush=True)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2", "1B"], choices=MODELS)
    parser.add_argument("--contexts", nargs="+", type=int, default=[128], help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender after a first one")
    parser.add_argument("--plain", action="store_true", help="ours without prepare_for_generation_ too")
    parser.add_argument("--no-dense", dest="dense", action="store_false")
    parser.add_argument("--no-llama", dest="llama", action="store_false")
    parser.add_argument("--packed-caches", nargs="*", type=int, default=[], help="bits of HqqQuantizedCache, ours too")
    parser.add_argument("--llama-caches", nargs="+", default=["f16"], choices=["f16", "q8_0", "q4_0"])
    parser.add_argument("--flash", action="store_true", help="llama.cpp's flash attention with an f16 cache as well")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    print(machine())
    try:
        rows = run_all(args)
    except NotHere as error:
        raise SystemExit(str(error)) from None
    write_json(args.json, rows)
    return rows


if __name__ == "__main__":
    main()
