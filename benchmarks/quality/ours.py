"""hqqtensor's own settings in the table."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.method import Method
from benchmarks.quality.task import Task
from hqqtensor import HqqConfig, dequantize_, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, choose_config, measure_sensitivity

META = {"quant_scale": True, "quant_zero": True}
# These models' rows are short: 8-bit metadata comes in runs of eight, which these group sizes fill.
FILLING = tuple({"nbits": b, "group_size": g, **META} for b in (2, 3, 4) for g in (44, 48))
SETTINGS: tuple[dict[str, Any], ...] = tuple(
    {**c, "solver": solver} for c in (*CANDIDATES, *FILLING) for solver in ("hqq_joint", "column_scaled")
)
SKIP = ["lm_head", "pooler"]
CACHE = Path(".quality")


def _apply(model: nn.Module, task: Task, config: HqqConfig, mode: str | None = None) -> float:
    names = set(task.layers)
    # Half of what GPTQ and AWQ are given here: enough, and quicker.
    calibration = calibrate(model, task.tuning[: len(task.tuning) // 2], mode) if mode else None
    quantize_(model, config, filter_fn=lambda _, name: name in names, calibration=calibration)
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
    with torch.no_grad():
        found = measure_sensitivity(model, base, batches, SETTINGS, file)
    return _apply(model, task, choose_config(model, found, base, target_bpw=bits).config, mode)


def methods() -> list[Method]:
    found = []

    def add(name: str, nbits: int, config: HqqConfig, mode: str | None = None) -> None:
        run = lambda m, t: _apply(m, t, config, mode)  # noqa: E731
        found.append(Method(f"hqqtensor {name}", nbits, run, data="text" if mode else "", ours=True))

    for b in (8, 4, 3, 2):
        add(f"{b}-bit g64", b, HqqConfig(b, 64))
    for b in (4, 3, 2):
        add(f"{b}-bit g32 8-bit meta", b, HqqConfig(b, 32, **META))
        add(f"{b}-bit g32 8-bit meta, columns", b, HqqConfig(b, 32, solver="column_scaled", **META))
        # Calibration ties as GPTQ's bits: groups of 64 with 16-bit scale and zero point, as hqq has.
        add(f"{b}-bit g64 full calibration", b, HqqConfig(b, 64), "full")
    add("2-bit g16 8-bit meta, columns", 2, HqqConfig(2, 16, solver="column_scaled", **META))
    for nbits, bits in ((4, 4.5), (3, 3.5), (3, 3.0), (2, 2.5)):
        for data in ("model", "text"):
            mode = "full" if data == "text" else None
            label = "searched" if data == "model" else "searched, full calibration"
            found.append(
                Method(f"hqqtensor {label} {bits}", nbits,
                       lambda m, t, b=bits, d=data, o=mode: _searched(m, t, b, d, o), data=data, ours=True)
            )  # fmt: skip
    return found
