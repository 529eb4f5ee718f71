"""hqqtensor's own settings in the table."""

from pathlib import Path

import torch
from torch import nn

from benchmarks.quality.method import Method
from benchmarks.quality.task import Task
from hqqtensor import HqqConfig, dequantize_, quantize_
from hqqtensor.calibration import calibrate, finetune
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, LEARNED, choose_config, measure_sensitivity

META = {"quant_scale": True, "quant_zero": True}
SOLVERS = ("hqq_joint", "column_scaled")
SKIP = ["lm_head", "pooler"]
CACHE = Path(".quality")


def _apply(model: nn.Module, task: Task, config: HqqConfig, data: str = "", mode: str | None = None) -> float:
    names = set(task.layers)
    calibration = None
    if mode is not None:
        batches = task.random_tokens(0) if data == "model" else task.tuning
        # Half of what GPTQ and AWQ are given here: enough, and quicker.
        calibration = calibrate(model, batches[: len(batches) // 2], mode)
    quantize_(model, config, filter_fn=lambda _, name: name in names, calibration=calibration)
    bits = 8.0 * model_size(model).quantized_nbytes
    dequantize_(model)
    return bits


def _finetuned(model: nn.Module, task: Task, config: HqqConfig) -> float:
    names = set(task.layers)
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    # Small batches, more steps: a quarter of those that the others take at a time.
    half = [{k: v[i : i + 2] for k, v in b.items()} for b in task.tuning for i in range(0, len(b["input_ids"]), 2)]
    finetune(model, task.model, half[: len(half) // 2], steps=120, lr=5e-3)
    bits = 8.0 * model_size(model).quantized_nbytes
    dequantize_(model)
    return bits


def _searched(model: nn.Module, task: Task, bits: float, data: str, mode: str | None = None) -> float:
    base = HqqConfig(skip_modules=SKIP)
    batches = task.random_tokens(0)[:1] if data == "model" else task.tuning[:1]
    if task.name == "MiniLM" and data == "text":
        batches = task.tuning[:32]
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / f"sensitivity-{task.name}-{data}.json"
    # Calibration serves integers.
    formats = CANDIDATES if mode else (*CANDIDATES, *LEARNED)
    settings = tuple({**c, "solver": solver} for c in formats for solver in SOLVERS)
    with torch.no_grad():
        found = measure_sensitivity(model, base, batches, settings, file)
    return _apply(model, task, choose_config(model, found, base, target_bpw=bits).config, data, mode)


def methods() -> list[Method]:
    found = []

    def add(name: str, nbits: int, config: HqqConfig, data: str = "") -> None:
        run = lambda m, t: _apply(m, t, config, data, "full" if data else None)  # noqa: E731
        found.append(Method(f"hqqtensor {name}", nbits, run, data=data, ours=True))

    for b in (8, 4, 3, 2):
        add(f"{b}-bit g64", b, HqqConfig(b, 64))
    for b in (4, 3, 2):
        add(f"{b}-bit g64, rotated", b, HqqConfig(b, 64, rotation=True))
        found.append(Method(f"hqqtensor {b}-bit g64, fine-tuned", b,
                            lambda m, t, b=b: _finetuned(m, t, HqqConfig(b, 64)), data="text", ours=True))  # fmt: skip
        add(f"{b}-bit g32 8-bit meta, columns", b, HqqConfig(b, 32, solver="column_scaled", **META))
        learned = HqqConfig(b, 20, format="codebook", quant_scale=True, solver="column_scaled")
        add(f"{b}-bit g20 learned, 8-bit scales, columns", b, learned)
        # No more bits than hqq's, whose groups of 64 have 16-bit scale and zero point.
        add(f"{b}-bit g40 8-bit meta, random tokens", b, HqqConfig(b, 40, **META), "model")
        # As many bits as hqq's; with 8-bit metadata, fewer than GPTQ's.
        add(f"{b}-bit g64 full calibration", b, HqqConfig(b, 64), "text")
        add(f"{b}-bit g64 8-bit meta, full calibration", b, HqqConfig(b, 64, **META), "text")
    add("2-bit g64, random tokens", 2, HqqConfig(2, 64), "model")
    add("2-bit g16 8-bit meta, columns", 2, HqqConfig(2, 16, solver="column_scaled", **META))
    add("2-bit g20 learned, 8-bit scales", 2, HqqConfig(2, 20, format="codebook", quant_scale=True))
    add("2-bit g16 learned, 8-bit scales", 2, HqqConfig(2, 16, format="codebook", quant_scale=True))
    for nbits, bits in ((4, 4.5), (3, 3.5), (3, 3.0), (2, 2.5)):
        for data in ("model", "text"):
            mode = "full" if data == "text" else None
            label = "searched" if data == "model" else "searched, full calibration"
            found.append(
                Method(f"hqqtensor {label} {bits}", nbits,
                       lambda m, t, b=bits, d=data, o=mode: _searched(m, t, b, d, o), data=data, ours=True)
            )  # fmt: skip
    return found
