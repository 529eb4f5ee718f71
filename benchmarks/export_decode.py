"""``python -m benchmarks.export_decode``: tokens a second of an AOTInductor package beside ``model.generate()``.

SmolLM2 from its Q4_1 file, bfloat16. The package has a static cache and is driven by a loop in Python that takes the
likeliest token; ``generate()`` decodes after ``prepare_for_generation_``. All decode greedily from the same prompt and
take turns. The last column counts the tokens that are ``generate()``'s: rounding in bf16 lets answers part.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from benchmarks.decode.hf_runner import HfRunner
from benchmarks.timing import machine, write_json
from hqqtensor import cli as command_line
from hqqtensor.compile import JoinLinears
from hqqtensor.demo.models import smollm_gguf
from hqqtensor.diagnostics.table import text_table
from hqqtensor.generation import prepare_for_generation_

Package = Callable[..., Tensor]


class PackageRunner:
    """Drives a package as ``HfRunner`` drives a model."""

    def __init__(self, name: str, package: Package) -> None:
        self.name, self.package = name, package

    def generate(self, ids: Tensor, new: int) -> tuple[list[float], list[list[int]]]:
        """Greedy: seconds from the start to each of ``new`` tokens of ids ``[1, T]``, and these tokens."""
        times, tokens, position = [], [], 0
        started = time.perf_counter()
        for _ in range(new):
            positions = torch.arange(position, position + ids.shape[1])
            logits = self.package(input_ids=ids, cache_position=positions)
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - started)
            tokens.append(int(ids))
        return times, [tokens]


def package_of(model: Any, length: int, path: Path, one_token: bool, settings: dict[str, Any]) -> Package:
    """``model`` with a static cache of ``length`` tokens, exported, compiled into ``path`` and loaded.

    one_token: the package takes one token at a time, and shapes are constants; else as many as the cache has room for.
    """
    model.generation_config.use_cache, model.generation_config.cache_implementation = True, "static"
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=length)
    tokens = 1 if one_token else 5
    example = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "cache_position": torch.arange(tokens)}
    count = torch.export.Dim("tokens", min=1, max=length)
    shapes = None if one_token else {"input_ids": {1: count}, "cache_position": {0: count}}
    with torch.no_grad():
        exported = torch.export.export(module, (), example, dynamic_shapes=shapes, strict=True)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    return torch._inductor.aoti_load_package(str(path))


def prompt_by_tokens(package: Package) -> Package:
    """A package for one token at a time as one that takes a prompt too, token by token."""

    def run(input_ids: Tensor, cache_position: Tensor) -> Tensor:
        each = zip(input_ids.split(1, 1), cache_position.split(1), strict=True)
        return [package(input_ids=ids, cache_position=position) for ids, position in each][-1]

    return run


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each after a first one")
    parser.add_argument("--layers", type=int, help="only the first of the model's 30 layers")
    kinds = ["any", "one"]
    parser.add_argument("--packages", nargs="+", default=kinds, choices=kinds, help="tokens at a time")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    print(machine())
    layers = {} if args.layers is None else {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        command_line.main(["convert", str(smollm_gguf()), f"{folder}/packed"])

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(f"{folder}/packed", dtype=torch.bfloat16, **layers).eval()

        runners: list[Any] = [HfRunner("generate()", "ours", prepare_for_generation_(load()))]
        for kind in args.packages:
            started, path = time.perf_counter(), Path(folder, f"{kind}.pt2")
            settings = {"post_grad_custom_pre_pass": JoinLinears()}
            package = package_of(load(), args.context + args.new, path, kind == "one", settings)
            print(f"package of {kind}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
            run = prompt_by_tokens(package) if kind == "one" else package
            runners.append(PackageRunner(f"package, {kind} token{'' if kind == 'one' else 's'} at a time", run))
        rows = measure(runners, torch.randint(10, 32000, (1, args.context)), args.new, args.rounds)
    show(rows)
    write_json(args.json, [{k: v for k, v in row.items() if k != "tokens"} for row in rows])
    return rows


@torch.no_grad()
def measure(runners: list[Any], ids: Tensor, new: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each runner: median tokens a second after the first token, and all tokens of the last turn."""
    rates: dict[str, list[float]] = {runner.name: [] for runner in runners}
    tokens = {}
    for turn in range(rounds + 1):
        for runner in runners:
            times, answers = runner.generate(ids, new)
            tokens[runner.name] = answers[0]
            if turn or rounds == 0:  # the first turn is a warm-up
                rates[runner.name].append((new - 1) / (times[-1] - times[0]))
    return [{"name": n, "tokens/s": statistics.median(rate), "tokens": tokens[n]} for n, rate in rates.items()]


def show(rows: list[dict[str, Any]]) -> None:
    first, lines = rows[0], []
    for row in rows:
        same = sum(a == b for a, b in zip(row["tokens"], first["tokens"], strict=True))
        over = f"{row['tokens/s'] / first['tokens/s']:.2f} x"
        lines.append((row["name"], f"{row['tokens/s']:.1f}", over, f"{same}/{len(row['tokens'])}"))
    print(text_table(("", "tokens/s", "over", "same tokens"), lines), flush=True)


if __name__ == "__main__":
    main()
