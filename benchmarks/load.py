"""How soon a quantized model of 7B shapes is ready, and what a second process adds: ``python -m benchmarks.load``.

The directory is written piece by piece, 3.9 GB of random codes in the default 4-bit settings, and removed at the end.
Two processes load it one after the other, use every weight, and stay while their memory is read from smaps_rollup.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from hqqtensor import PRESETS, HQQTensor
from hqqtensor.config import HqqConfig
from hqqtensor.serialization.files import index_path, write_tensors
from hqqtensor.serialization.header import file_metadata
from hqqtensor.serialization.layout import flatten

SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 1000},
}  # fmt: skip
DISK = {"7B": 5 << 30, "small": 64 << 20}
"""Bytes that must be free."""

CHILD = """
import json, sys, time
began = time.perf_counter()
import torch, hqqtensor, transformers
transformers.LlamaForCausalLM, transformers.AutoConfig, transformers.GenerationConfig
imported = time.perf_counter()
model = hqqtensor.load(sys.argv[1], generation=sys.argv[2] == "generation")
ready = time.perf_counter()
with torch.no_grad():
    model(torch.ones(1, 1, dtype=torch.int64))
    used = time.perf_counter()
    again = torch.ones(1, 1, dtype=torch.int64)
    cache = model(again, use_cache=True).past_key_values
    for _ in range(4):
        model(again, past_key_values=cache, use_cache=True)
memory = {}
for line in open("/proc/self/smaps_rollup"):
    name, _, rest = line.partition(":")
    if rest.strip().endswith("kB"):
        memory[name] = int(rest.split()[0]) << 10
print(json.dumps({"import": imported - began, "load": ready - imported, "first_token": used - ready,
                  "memory": memory}), flush=True)
sys.stdin.read()
"""


def write_model(directory: Path, size: str) -> int:
    """A quantized Llama with random codes; the bytes of its weights. Memory for one layer is needed."""
    shapes, config = SIZES[size], PRESETS["4"]
    width, inner, vocabulary = (shapes[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    norms = ("input_layernorm", "post_attention_layernorm")
    embedding = config.for_embedding(width)
    templates = {shape: _template(shape, config) for shape in set(layer.values())}
    rows = _template((vocabulary, width), embedding)
    files: list[dict[str, HQQTensor | torch.Tensor]] = [
        {"model.embed_tokens.weight": rows, "lm_head.weight": rows, "model.norm.weight": _ones(width)}
    ]
    for i in range(shapes["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        weights: dict[str, Any] = {f"{prefix}.{name}.weight": templates[shape] for name, shape in layer.items()}
        files.append({**weights, **{f"{prefix}.{norm}.weight": _ones(width) for norm in norms}})
    entries = {name: _entry(name, tensor) for some in files for name, tensor in some.items()}
    header, index, total = file_metadata(entries, {}, []), {}, 0
    for place, some in enumerate(files):
        path = directory / f"model-{place + 1:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in some.items():
            tensors |= _with_random_codes(name, tensor)
        write_tensors(tensors, path, header, path)
        index |= dict.fromkeys(tensors, path.name)
        total += sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    index_path(directory / "model.safetensors").write_text(text)
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "hqqtensor", **config.to_dict()}, **shapes,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings))
    return total


def _template(shape: tuple[int, int], config: HqqConfig) -> HQQTensor:
    generator = torch.Generator().manual_seed(0)
    return HQQTensor.from_hp(torch.randn(shape, generator=generator).mul_(0.02).bfloat16(), config)


def _ones(width: int) -> torch.Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


def _entry(name: str, tensor: HQQTensor | torch.Tensor) -> str:
    return flatten(name, tensor)[1] if isinstance(tensor, HQQTensor) else json.dumps({"_type": "Tensor"})


def _with_random_codes(name: str, tensor: HQQTensor | torch.Tensor) -> dict[str, torch.Tensor]:
    if not isinstance(tensor, HQQTensor):
        return {name: tensor}
    codes = torch.randint(0, 256, tensor.qdata.shape, dtype=torch.uint8)
    parts = flatten(name, tensor.with_data(qdata=codes))[0]
    return {key: part.clone() for key, part in parts.items()}  # no two weights of a file may share memory


def measure(directory: Path, rounds: int, mode: str) -> dict[str, Any]:
    """Times of ``rounds`` processes (medians), then the memory of two that live at the same time."""
    for path in directory.iterdir():  # into the page cache
        with open(path, "rb") as file:
            while file.read(64 << 20):
                pass
    results = [_finish(*_start(directory, mode)) for _ in range(rounds)]
    first, figures = _start(directory, mode)
    second, others = _start(directory, mode)
    for child in (first, second):
        child.communicate("")
    times = {name: statistics.median(r[name] for r in results) for name in ("import", "load", "first_token")}
    private = sum(others["memory"][name] for name in ("Private_Clean", "Private_Dirty"))
    resident = figures["memory"]["Rss"]
    return {
        **times,
        "first_resident": resident,
        "second_private": private,
        "second_share": private / resident,
        "second_proportional": others["memory"]["Pss"],
    }


def _start(directory: Path, mode: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-c", CHILD, str(directory), mode]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that loads ended with {child.wait()}")
    return child, json.loads(line)


def _finish(child: subprocess.Popen[str], figures: dict[str, Any]) -> dict[str, Any]:
    child.communicate("")
    return figures


def main(argv: list[str] | None = None) -> None:
    """Write the model, measure, print, remove it."""
    parser = argparse.ArgumentParser(description="time and memory of loading a quantized model")
    parser.add_argument("--small", action="store_true", help="a model of 2 MB instead of 3.9 GB")
    parser.add_argument("--generation", action="store_true", help="load with generation=True")
    parser.add_argument("--rounds", type=int, default=3, help="processes that are timed (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to write the model (default: the system's)")
    args = parser.parse_args(argv)
    size = "small" if args.small else "7B"
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="hqqtensor-load-") as folder:
        free = shutil.disk_usage(folder).free
        if free < DISK[size]:
            sys.exit(f"{folder} has {free >> 20} MiB free; this needs {DISK[size] >> 20}")
        nbytes = write_model(Path(folder), size)
        result = measure(Path(folder), args.rounds, "generation" if args.generation else "plain")
    print(json.dumps({"machine": machine(), "weights": nbytes, **result}, indent=1))


if __name__ == "__main__":
    main()
