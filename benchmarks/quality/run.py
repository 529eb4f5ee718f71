"""Runs methods on tasks, one result a JSON file, so that a stopped run goes on where it was."""

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.method import Method
from benchmarks.quality.task import Task

SEED = 0


def result_of(method: Method, task: Task, half: str, cache: Path, fresh: bool) -> dict[str, Any]:
    """Figures of ``method`` on ``task``, from ``cache`` where they are there."""
    file = cache / f"{task.name}-{half}-{re.sub(r'[^A-Za-z0-9.-]+', '_', method.name)}.json"
    if file.is_file() and not fresh:
        return json.loads(file.read_text())
    torch.manual_seed(SEED)
    model = copy.deepcopy(task.model)
    started = time.perf_counter()
    bits = method.quantize(model, task)
    seconds = time.perf_counter() - started
    weights = sum(task.model.get_submodule(name).weight.numel() for name in task.layers)
    result = {
        "task": task.name, "half": half, "method": method.name, "nbits": method.nbits, "ours": method.ours,
        "data": method.data, "bits": bits / weights, "seconds": seconds, "seed": SEED,
        "errors": task.weight_errors(model, half), "windows": task.measure(model, half),
    }  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    return result


def cached(cache: Path, half: str) -> list[dict[str, Any]]:
    """All results of ``half`` in ``cache``."""
    return [json.loads(file.read_text()) for file in sorted(cache.glob(f"*-{half}-*.json"))]
