"""Large requests for memory that are refused: inside ``quantize_``, calibration, loading and ``generate``.

The model is then what it was, or wholly what it was to become, and there is one error that speaks of memory.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.inject import COUNT_MEMORY, MEMORY_FAULTS, Fault, Injector
from faults.rows import Row, in_child, row_of
from faults.scenarios import tiny_llama as llama
from hqqtensor import HqqConfig, HQQTensor, load_model, prepare_for_generation_, quantize_, save_model

LARGE = 16384
"""Bytes of a request that counts. The packed codes of a matrix of the model take twice as many.

Torch dies where the few kilobytes are refused in which it puts an error's backtrace.
"""

_BATCHES = [torch.arange(64).reshape(1, 64)]
_PROMPT = torch.arange(8).reshape(1, 8)
_ABOUT_MEMORY = re.compile(r"memory|alloc", re.IGNORECASE)

tiny_llama = partial(llama, 0, 256)

Numbers = dict[str, tuple[type, Tensor]]


@dataclass(frozen=True)
class MemoryScenario:
    """make: the model before. work: what runs short of memory; returns what it computes, if anything."""

    name: str
    make: Callable[[], Any]
    work: Callable[[Any], Any]


def _numbers(model: Any) -> Numbers:
    return {
        name: (type(t), (t.dequantize() if isinstance(t, HQQTensor) else t).clone())
        for name, t in model.state_dict().items()
    }


def _same(a: Numbers, b: Numbers) -> bool:
    return a.keys() == b.keys() and all(
        kind is b[name][0] and tensor.dtype == b[name][1].dtype and torch.equal(tensor, b[name][1])
        for name, (kind, tensor) in a.items()
    )


def _quantized() -> Any:
    model = tiny_llama()
    quantize_(model, HqqConfig(4, 32))
    return model


def _on_meta() -> Any:
    with torch.device("meta"):
        return tiny_llama().to("meta")


def _generate(model: Any) -> Any:
    return model.generate(_PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)


def _prepared() -> Any:
    return prepare_for_generation_(_quantized())


def memory_scenarios(folder: Path) -> list[MemoryScenario]:
    """All of them; ``folder`` gets a checkpoint to load."""
    file = folder / "model.safetensors"
    save_model(_quantized(), file)
    return [
        MemoryScenario("quantize_", tiny_llama, partial(quantize_, config=HqqConfig(4, 32))),
        MemoryScenario("quantize_, column scales", tiny_llama, partial(quantize_, config=HqqConfig(3, "auto"))),
        MemoryScenario("quantize_, calibrated", tiny_llama,
                       partial(quantize_, config=HqqConfig(4, 32), calibration=_BATCHES)),
        MemoryScenario("load_model", tiny_llama, lambda model: load_model(model, file) and None),
        MemoryScenario("load_model, mmap=False", tiny_llama,
                       lambda model: load_model(model, file, mmap=False) and None),
        MemoryScenario("save_model", _quantized, lambda model: save_model(model, folder / "again.safetensors")),
        MemoryScenario("generate", _quantized, _generate),
        MemoryScenario("prepare_for_generation_", _quantized, lambda model: prepare_for_generation_(model) and None),
        MemoryScenario("generate, prepared", _prepared, _generate),
    ]  # fmt: skip


class MemoryRun:
    """One scenario with all of its faults."""

    def __init__(self, scenario: MemoryScenario, injector: Injector, folder: Path) -> None:
        self.scenario, self.injector, self.folder, self.log = scenario, injector, folder, folder / "log"
        self.row = Row(scenario.name)
        self.model = scenario.make()
        self.before = _numbers(self.model)
        model = scenario.make()
        self.result = scenario.work(model)
        self.after = _numbers(model)
        self.inject(COUNT_MEMORY, 1)
        self.row.calls = len(injector.log)
        assert self.row.absorbed == 1, self.row.failures
        self.row.faults = self.row.absorbed = 0

    def faults(self) -> list[tuple[Fault, int]]:
        """Every fault at every large request."""
        return [(fault, at + 1) for fault in MEMORY_FAULTS for at in range(self.row.calls)]

    def inject(self, fault: Fault, at: int) -> None:
        """One run in which it happens; adds what came of it."""
        self.injector.set(fault, at, self.folder, LARGE)
        ended = in_child(self._work, self.log)
        self.row.faults += 1
        if ended.code in (0, 1, 2):
            self.row.absorbed += ended.code == 0
            self.row.old += ended.code == 1
            self.row.new += ended.code == 2
        else:
            text = ended.stderr.partition("Extension modules")[0][-1500:]
            self.row.failures.append(f"{fault.name} at request {at}: ended with {ended.code}: {text}")

    def _work(self) -> int:
        """0: done nonetheless. 1, 2: an error, and the model is what it was, or what it was to become."""
        self.injector.arm()
        try:
            result = self.scenario.work(self.model)
        except Exception as error:
            self.injector.disarm()
            assert _ABOUT_MEMORY.search(f"{type(error).__name__} {error}"), f"{type(error).__name__}: {error}"
            now = _numbers(self.model)
            was = _same(now, self.before)
            assert was or _same(now, self.after), "the model is neither what it was nor what it was to become"
            again = self.scenario.work(self.model) if was else self.result
            assert self._is_right(again), "after the error the same call gives something else"
            return 1 if was else 2
        self.injector.disarm()
        assert self._is_right(result), "no error, and another answer"
        return 0

    def _is_right(self, result: Any) -> bool:
        if not isinstance(self.result, Tensor):
            return _same(_numbers(self.model), self.after)
        return torch.equal(result, self.result)


def run_memory(names: list[str], seed: int, share: float, folder: Path) -> list[Row]:
    """Every scenario with its faults, or a share of them."""
    torch.set_num_threads(1)
    injector = Injector()
    chosen = [scenario for scenario in memory_scenarios(folder) if not names or scenario.name in names]
    return [row_of(partial(MemoryRun, scenario, injector, folder), seed, share) for scenario in chosen]
