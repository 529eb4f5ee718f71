"""``python -m benchmarks.speed_quality --json FILE``: KL to the dense model against tokens a second, by setting.

SmolLM2-135M-Instruct, as users run each side: ``hqqtensor quantize`` and ``prepare_for_generation_``, llama.cpp on a
file of its own types, transformers with bitsandbytes and torchao. KL is that of the very model that is timed, output
layer and embedding included, on the reporting text of benchmarks.quality. Tokens are decoded greedily after a prompt
of 128, all contenders in turns. llama.cpp's types of fewer than 4 bits need rows of a multiple of 256, which this
model lacks: it stores most of them in larger types, so they are not points of their own here.
"""

import argparse
import functools
import gc
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.decode import gguf_file
from benchmarks.decode.hf_runner import HfRunner
from benchmarks.decode.llama_runner import LlamaRunner
from benchmarks.generate import measure
from benchmarks.quality.task import TASKS, LanguageTask
from benchmarks.timing import machine, write_json
from hqqtensor import cli
from hqqtensor.demo.models import smollm_dir
from hqqtensor.diagnostics.table import text_table
from hqqtensor.generation import prepare_for_generation_

META = ["--quant-metadata", "4"]
OURS = {
    "8 bits": ["--bits", "8"],
    "4 bits, g64": ["--bits", "4", "--group-size", "64"],
    "4 bits, default": ["--bits", "4"],
    "4 bits, own text": ["--bits", "4", "--group-size", "32", *META, "--calibrate", "self"],
    "3 bits, default": ["--bits", "3"],
    "3 bits, own text": ["--bits", "3", "--calibrate", "self"],
    "2 bits, own text": ["--bits", "2", "--group-size", "16", *META, "--calibrate", "self"],
}
"""Options of ``hqqtensor quantize`` by label."""
LLAMA = ("Q8_0", "Q5_0", "Q4_0", "IQ4_NL")
"""llama.cpp's types for the layers; the embedding, which is the output layer, has Q8_0. Not Q4_1: the dense weights are
those of a Q4_1 file, which it would give back."""
Contender = tuple[Any, float]
"""A runner, and the KL of its model."""


@functools.cache
def language_task() -> LanguageTask:
    task = TASKS["SmolLM2"]()
    assert isinstance(task, LanguageTask)
    return task


@functools.cache
def dense_log_p(index: int) -> Tensor:
    """float32 ``[T - 1, V]``: what the dense model says of a reporting window."""
    task = language_task()
    with torch.no_grad():
        return task.model(task.halves["report"][index : index + 1]).logits[0, :-1].float().log_softmax(-1)


def kl(logits: Callable[[Tensor], Tensor]) -> float:
    """Mean KL over the reporting windows. logits: float32 ``[T - 1, V]`` of a window ``[T]``."""
    total, windows = 0.0, language_task().halves["report"]
    with torch.no_grad():
        for index, ids in enumerate(windows):
            log_p = dense_log_p(index)
            log_q = logits(ids).log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(windows)


def of_transformers(name: str, kind: str, model: Any) -> Contender:
    found = kl(lambda ids: model(ids.unsqueeze(0)).logits[0, :-1].float())
    return HfRunner(name, kind, model), found


def ours(folder: Path) -> list[Contender]:
    out = []
    for label, options in OURS.items():
        target = folder / label.replace(" ", "_")
        if not target.exists():
            cli.main(["quantize", str(smollm_dir()), str(target), *options])
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
        out.append(of_transformers(f"hqqtensor {label}", "ours", prepare_for_generation_(model)))
    return out


def llama_cpp(folder: Path, stack: ExitStack) -> list[Contender]:
    if gguf_file.available() is not None:
        print(f"left out: llama.cpp ({gguf_file.available()})")
        return []
    task = language_task()
    config = task.model.config
    weights = {name: p.detach() for name, p in task.model.named_parameters()}
    out = []
    for kind in LLAMA:
        path = folder / f"{kind}.gguf"
        gguf_file.write_gguf(path, config, weights, (kind, "Q8_0"))
        runner = LlamaRunner(f"llama.cpp {kind}", path, config.vocab_size, task.context + 8)
        stack.callback(runner.close)
        out.append((runner, kl(lambda ids, runner=runner: runner.logits(ids)[:-1])))  # type: ignore[misc]
    return out


def peers() -> list[Contender]:
    load = functools.partial(AutoModelForCausalLM.from_pretrained, smollm_dir(), dtype=torch.bfloat16)
    makers: dict[str, Callable[[], Any]] = {
        "dense bf16": lambda: load(),
        "bitsandbytes NF4": lambda: load(quantization_config=_nf4(), device_map="cpu"),
        "torchao int8": lambda: _torchao(load()),
    }
    out = []
    for name, make in makers.items():
        try:
            out.append(of_transformers(name, "dense" if name == "dense bf16" else "peer", make().eval()))
        except (ImportError, RuntimeError, NotImplementedError) as error:
            print(f"left out: {name} ({str(error).splitlines()[0]})")
    return out


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _torchao(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where quantized directories are kept for the next run")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    print(machine())
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
        found = [*ours(args.folder or scratch), *llama_cpp(scratch, stack), *peers()]
        gc.collect()
        ids = torch.randint(10, 40000, (1, 128), generator=torch.manual_seed(0))
        rows = measure([runner for runner, _ in found], ids, args.new, args.rounds)
        for row, (_, divergence) in zip(rows, found, strict=True):
            row["kl"] = divergence
            del row["tokens"]
        cells = [(r["name"], f"{r['MB']:.0f}", f"{r['kl']:.3f}", f"{r['tokens/s']:.1f}") for r in rows]
        print(text_table(("", "MB", "KL", "tokens/s"), cells))
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
