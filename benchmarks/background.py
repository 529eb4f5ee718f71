"""What quantizing in the background does to a model's answers: ``python -m benchmarks.background DIR``.

Latency of a forward pass of one token before, during and after, resident memory, and the time that the job takes while
the model answers without a pause and while nobody asks. DIR: a dense transformers directory.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.timing import machine
from hqqtensor import PRESETS, background, quantize_in_background


def latencies(model: Any, ids: torch.Tensor, more: Any) -> list[float]:
    """Seconds of passes of one token behind a cache, as long as ``more()`` says, three at least."""
    times: list[float] = []
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        while len(times) < 3 or more():
            began = time.perf_counter()
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - began)
            cache.crop(-1)
    return times


def resident() -> dict[str, int]:
    """Bytes of anonymous memory and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: line.split()[1] for line in lines for name in ("RssAnon", "RssFile") if line.startswith(name)}
    return {name: int(kilobytes) << 10 for name, kilobytes in found.items()}


def open_model(directory: str, in_memory: bool) -> Any:
    """The dense model; ``in_memory`` copies its weights out of the mapped file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    if in_memory:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def measure(directory: str, in_memory: bool, count: int) -> dict[str, Any]:
    """All figures of one kind of memory."""
    config = PRESETS["4"]
    ids = torch.arange(1, 17)[None]
    model = open_model(directory, in_memory)
    passes = iter(range(count))
    before = latencies(model, ids, lambda: next(passes, None) is not None)
    memory = [resident()]
    began = time.perf_counter()
    job = quantize_in_background(model, config)
    returned = time.perf_counter() - began
    during = latencies(model, ids, lambda: job.state == "running")
    job.wait()
    memory.append(resident())
    passes = iter(range(count))
    after = latencies(model, ids, lambda: next(passes, None) is not None)
    del model
    idle_job = quantize_in_background(open_model(directory, in_memory), config)
    idle_job.wait()
    return {
        "call_returns_s": returned,
        "job_while_answering_s": job.progress().seconds,
        "job_alone_s": idle_job.progress().seconds,
        **{name: _percentiles(times) for name, times in (("before", before), ("during", during), ("after", after))},
        "memory_before": memory[0],
        "memory_after": memory[1],
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    p95 = ordered[round(0.95 * (len(ordered) - 1))]
    return {"passes": len(times), "p50_ms": 1e3 * statistics.median(times), "p95_ms": 1e3 * p95}


def main(argv: list[str] | None = None) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="latency of a model while it is quantized in the background")
    parser.add_argument("directory", metavar="DIR", help="dense transformers directory")
    parser.add_argument("--passes", type=int, default=100, help="passes before and after (default: 100)")
    parser.add_argument("--nicer", type=int, default=background.NICER, help="priority, 0 for the process's own")
    parser.add_argument("--mapped", action="store_true", help="leave the dense weights in the mapped file")
    args = parser.parse_args(argv)
    background.NICER = args.nicer
    result = measure(args.directory, not args.mapped, args.passes)
    print(json.dumps({"machine": machine(), "nicer": args.nicer, **result}, indent=1))


if __name__ == "__main__":
    main()
