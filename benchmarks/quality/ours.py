"""hqqtensor's own settings in the table."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality import texts
from benchmarks.quality.method import Method
from benchmarks.quality.task import BATCH, Task, smollm_windows
from hqqtensor import HqqConfig, dequantize_, quantize_
from hqqtensor.calibration import finetune
from hqqtensor.calibration.data import TOKENS, batches_of
from hqqtensor.demo.models import CACHE as MODELS
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, LEARNED, Sensitivity, choose_config, measure_sensitivity

META = {"quant_scale": True, "quant_zero": True, "meta_nbits": 4}
SCALES = {"format": "codebook", "quant_scale": True, "meta_nbits": 4}
SOLVERS = ("hqq_joint", "column_scaled")
SKIP = ["lm_head", "pooler"]
CACHE = Path(".quality")


def _apply(model: nn.Module, task: Task, config: HqqConfig, data: str) -> float:
    """Quantize with error feedback from what ``batches`` gives for ``data``; "" quantizes from weights alone."""
    names = set(task.layers)
    is_long = data.isdigit()  # many tokens: a run that was stopped goes on
    folder = CACHE / f"unfinished-{task.name}-{config.nbits}-{config.solver}-{data}" if is_long else None
    calibration = batches(task, data) if data else None
    quantize_(model, config, filter_fn=lambda _, name: name in names, calibration=calibration, resume=folder)
    return _bits(model)


def _bits(model: nn.Module) -> float:
    """Stored bits of all quantized weights; the model is dense afterwards."""
    bits = 8.0 * model_size(model).quantized_nbytes
    dequantize_(model)
    return bits


def batches(task: Task, data: str) -> list[dict[str, Tensor]]:
    """Batches to calibrate on.

    data: "self" (8,192 tokens that the model writes), "model" (random tokens), "text", or a number of tokens of mixed
    text (``mixed``).
    """
    if data == "self":
        return _written(task)
    if data == "model":
        return task.random_tokens(0)
    if data == "text":
        # Half of what GPTQ and AWQ are given here: enough, and quicker. On SmolLM2 all have the same 8,192 tokens.
        return task.tuning if task.name == "SmolLM2" else task.tuning[: len(task.tuning) // 2]
    return mixed(task, int(data))


def _written(task: Task, seed: int = 0) -> list[dict[str, Tensor]]:
    """8,192 tokens that the dense model writes, kept in ``CACHE``: all methods see the same."""
    file = CACHE / f"written-{task.name}{f'-{seed}' if seed else ''}.pt"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(batches_of("self", task.model, seed=seed), file)
    return torch.load(file)


def mixed(task: Task, tokens: int) -> list[dict[str, Tensor]]:
    """SmolLM2's mixed text: half is its own, a quarter news, a quarter Python's documentation."""
    count = tokens // task.context
    own = [batch["input_ids"] for seed in range(-(-tokens // (2 * TOKENS))) for batch in _written(task, seed)]
    sources = [smollm_windows(text, count // 4) for text in (texts.news(MODELS), texts.documentation())]
    ids = torch.cat([torch.cat(own)[: count // 2], *sources])
    return [{"input_ids": part} for part in ids.split(BATCH // 2)]


def _finetuned(model: nn.Module, task: Task, config: HqqConfig) -> float:
    names = set(task.layers)
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    # Small batches, more steps: a quarter of those that the others take at a time.
    half = [{k: v[i : i + 2] for k, v in b.items()} for b in task.tuning for i in range(0, len(b["input_ids"]), 2)]
    finetune(model, task.model, half[: len(half) // 2], steps=120, lr=5e-3)
    return _bits(model)


def _searched(model: nn.Module, task: Task, bits: float, data: str) -> float:
    """Settings by layer, found by running the model on random tokens; ``data`` as in ``_apply``."""
    base = HqqConfig(skip_modules=SKIP)
    CACHE.mkdir(parents=True, exist_ok=True)
    settings = tuple({**c, "solver": solver} for c in (*CANDIDATES, *LEARNED) for solver in SOLVERS)
    file = CACHE / f"sensitivity-{task.name}.json"
    with torch.no_grad():
        found = measure_sensitivity(model, base, task.random_tokens(0)[:1], settings, file)
    if data:
        found = _integers(found)
    return _apply(model, task, choose_config(model, found, base, target_bpw=bits).config, data)


def _integers(found: Sensitivity) -> Sensitivity:
    """What calibration serves and does best with: integers without column scales."""
    kept = [i for i, c in enumerate(found.candidates) if "format" not in c and c["solver"] == "hqq_joint"]
    layers = {
        name: {"key": "", **{what: [entry[what][i] for i in kept] for what in ("bytes", "loss")}}
        for name, entry in found.layers.items()
    }
    return Sensitivity(found.method, [found.candidates[i] for i in kept], layers)


def methods() -> list[Method]:
    found = []
    kinds = {"": "", "self": "model", "model": "model"}

    def add(name: str, nbits: int, config: HqqConfig, data: str = "") -> None:
        run = lambda m, t: _apply(m, t, config, data)  # noqa: E731
        models = ("SmolLM2",) if data.isdigit() else ("SmolLM2", "doclm") if data == "self" else ()
        found.append(Method(f"hqqtensor {name}", nbits, run, kinds.get(data, "text"), ours=True, models=models))

    for b in (8, 4, 3, 2):
        add(f"{b}-bit g64", b, HqqConfig(b, 64))
    for b in (4, 3, 2):
        # No more bits than hqq's, whose groups of 64 have 16-bit scale and zero point.
        add(f"{b}-bit g20 4-bit meta", b, HqqConfig(b, 20, **META))
        # Groups of 20, 4-bit metadata and column scales.
        add(f"{b}-bit default", b, HqqConfig(b))
        # Fewer bits than GPTQ's.
        add(f"{b}-bit g32 4-bit meta, random tokens", b, HqqConfig(b, 32, **META), "model")
        add(f"{b}-bit g32 4-bit meta, full calibration", b, HqqConfig(b, 32, **META), "text")
        add(f"{b}-bit default, own text", b, HqqConfig(b), "self")
        add(f"{b}-bit default, full calibration", b, HqqConfig(b), "text")
        add(f"{b}-bit g32 4-bit meta, own text", b, HqqConfig(b, 32, **META), "self")
    add("3-bit default, 16k mixed tokens", 3, HqqConfig(3), "16384")
    add("2-bit g64, rotated", 2, HqqConfig(2, 64, rotation=True))
    add("2-bit g16 4-bit meta", 2, HqqConfig(2, 16, **META))
    chat = HqqConfig(2, 16, **META)
    add("2-bit g16 4-bit meta, own text", 2, chat, "self")
    add("2-bit g16 4-bit meta, full calibration", 2, chat, "text")
    add("2-bit g16 4-bit meta, 48k mixed tokens", 2, chat, "49152")
    add("2-bit g16 4-bit meta, columns", 2, HqqConfig(2, 16, solver="column_scaled", **META))
    add("2-bit g20 4-bit meta, random tokens", 2, HqqConfig(2, 20, **META), "model")
    for g in (10, 12):
        add(f"2-bit g{g} learned, 4-bit scales", 2, HqqConfig(2, g, **SCALES))
    found.append(
        Method("hqqtensor 2-bit g64, fine-tuned", 2, lambda m, t: _finetuned(m, t, HqqConfig(2, 64)), "text", True)
    )  # fmt: skip
    for nbits, bits in ((4, 4.5), (3, 3.5), (3, 3.0), (2, 2.5)):
        for label, data in (("", ""), (", random tokens", "model"), (", full calibration", "text")):
            run = lambda m, t, b=bits, d=data: _searched(m, t, b, d)  # noqa: E731
            found.append(Method(f"hqqtensor searched {bits}{label}", nbits, run, data or "model", True))
    return found
