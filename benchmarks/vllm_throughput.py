"""``python -m benchmarks.vllm_throughput``: tokens a second of vLLM at several numbers of clients, ours against others.

To be run by the Python of an environment with vLLM (``make vllm-test`` makes build/vllm-env), from the checkout. Each
contender is a process with a vLLM engine of its own. They take turns within each round; the other engines wait for
their input and compute nothing. A turn is ``clients`` requests at once with the same number of new tokens each.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS = {"4 bits": ["--bits", "4"], "4 bits g64": ["--bits", "4", "--group-size", "64", "--embeddings", "8"]}
INT8 = "4 bits g64, int8 activations"
THEIRS = ("GPTQ", "AWQ", "W8A8", "W4A8")


def engine(directory: str, compiled: bool, length: int) -> None:
    """A contender: reads "clients tokens" from stdin, answers with seconds, until its input ends."""
    from vllm import LLM, SamplingParams

    llm = LLM(directory, enforce_eager=not compiled, max_model_len=length, max_num_seqs=16, enable_prefix_caching=False)
    print("ready", flush=True)
    for line in sys.stdin:
        clients, tokens = map(int, line.split())
        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        prompts: Any = [{"prompt_token_ids": [1, 100 + client, *range(200, 230)]} for client in range(clients)]
        start = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)
        print(f"seconds {seconds}", flush=True)


class Contender:
    """A process of ``engine``. error: why it does not run, None where it does."""

    def __init__(self, name: str, directory: Path, args: argparse.Namespace, log: Path) -> None:
        self.name, self.log = name, log
        command = [sys.executable, "-m", "benchmarks.vllm_throughput", "--engine", str(directory)]
        command += ["--compiled"] if args.compiled else []
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )
        self.error = None if self.read("ready") is not None else self.last_error()

    def read(self, word: str) -> str | None:
        """What follows ``word`` in the next line that begins with it; None where the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        return None

    def last_error(self) -> str:
        """The last line of the log that names an error."""
        lines = [line.strip() for line in self.log.read_text().splitlines() if "Error" in line]
        return lines[-1][-200:] if lines else "ended without an error"

    def rate(self, clients: int, tokens: int) -> float:
        """Tokens a second of all clients together."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{clients} {tokens}\n")
        self.process.stdin.flush()
        seconds = self.read("seconds")
        if seconds is None:
            raise SystemExit(f"{self.name}: {self.last_error()}")
        return clients * tokens / float(seconds)

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


def one_billion(folder: Path) -> Path:
    """Random weights of the shapes of Llama-3.2-1B, with a tokenizer, which vLLM asks for."""
    import torch
    from transformers import LlamaForCausalLM

    from benchmarks.decode.weights import llama_1b
    from hqqtensor.demo.models import smollm_dir

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(llama_1b()).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for file in smollm_dir().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def directories(folder: Path, names: list[str], model: str) -> dict[str, Path]:
    """The model for each contender."""
    from benchmarks.vllm_checkpoints import write
    from hqqtensor.cli import main
    from hqqtensor.demo.models import smollm_dir

    dense = smollm_dir() if model == "SmolLM2" else one_billion(folder / "dense")
    out = {"dense bf16": dense}
    for name, options in OURS.items():
        if name in names or INT8 in names:
            assert main(["quantize", str(dense), str(folder / name), *options, "--json"]) == 0
            out[name] = folder / name
    if INT8 in names:
        out[INT8] = with_int8_activations(out["4 bits g64"], folder / INT8)
    for name in THEIRS:
        if name in names:
            out[name] = write(name, dense, folder / name)
    return {name: path for name, path in out.items() if name in names}


def with_int8_activations(source: Path, out: Path) -> Path:
    """A copy of a quantized directory whose layers round their inputs to 8 bits."""
    import hqqtensor
    from hqqtensor.tensor import HQQTensor

    model = hqqtensor.load(source)
    for parameter in model.parameters():
        if isinstance(parameter, HQQTensor):
            parameter.activation = "int8"
    model.save_pretrained(out)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def main() -> None:
    """Run what the command line asks for."""
    names = ["dense bf16", *OURS, INT8, *THEIRS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=["SmolLM2", "1B"], default="SmolLM2", help="1B: random weights")
    parser.add_argument("--compiled", action="store_true", help="with vLLM's torch.compile; eager otherwise")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.engine:
        engine(args.engine, args.compiled, 512)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = directories(Path(folder), args.contenders, args.model)
        contenders = [Contender(name, path, args, Path(folder, f"{name}.log")) for name, path in paths.items()]
        running = [contender for contender in contenders if contender.error is None]
        rates: dict[str, dict[int, list[float]]] = {c.name: {n: [] for n in args.clients} for c in running}
        for turn in range(args.rounds + 1):  # the first warms up
            for clients in args.clients:
                for contender in running:
                    rate = contender.rate(clients, args.tokens if turn else 4)
                    if turn:
                        rates[contender.name][clients].append(rate)
        for contender in contenders:
            contender.stop()
    report(args, contenders, rates)


def report(args: argparse.Namespace, contenders: list[Contender], rates: dict[str, dict[int, list[float]]]) -> None:
    """Print medians, and their ratios to dense bf16 of the same round."""
    dense = rates.get("dense bf16")
    print(f"tokens a second of all clients (times over dense bf16), {'compiled' if args.compiled else 'eager'}")
    print("".join([f"{'':32}", *(f"{n:>4} client{'s' if n > 1 else ' '}    " for n in args.clients)]))
    for contender in contenders:
        if contender.error is not None:
            print(f"{contender.name:32}does not run: {contender.error}")
            continue
        cells = []
        for clients, values in rates[contender.name].items():
            ratio = (
                f"({statistics.median(a / b for a, b in zip(values, dense[clients], strict=True)):.2f})"
                if dense
                else ""
            )
            cells.append(f"{statistics.median(values):7.1f} {ratio:8}")
        print(f"{contender.name:32}{'  '.join(cells)}")
    if args.json is not None:
        errors = {c.name: c.error for c in contenders if c.error is not None}
        args.json.write_text(json.dumps({"compiled": args.compiled, "rates": rates, "do not run": errors}, indent=1))


if __name__ == "__main__":
    main()
