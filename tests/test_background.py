"""quantize_in_background: the model answers all the time, and in the end is what quantize_ would have made of it."""

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_, quantize_in_background
from hqqtensor.parameters import places_by_id, swap_together

CONFIG = HqqConfig(4, 32)


class Tied(nn.Module):
    """An embedding tied to the output layer, with layers between."""

    def __init__(self, layers: int = 4, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(2048, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 2048, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and type(x) is type(y) and torch.equal(x, y) for (m, x), (n, y) in pairs)


def test_the_result_is_that_of_quantize() -> None:
    model, calls = Tied(), []
    want = copy.deepcopy(model)
    config = HqqConfig(4, 32, embedding_nbits=8)
    quantize_(want, config)
    job = quantize_in_background(model, config, progress=lambda *call: calls.append(call))
    assert job.wait() and job.wait(0) and job.state == "finished" and job.error is None
    assert same(model, want) and model.embed.weight is model.head.weight
    assert "HQQTensor" in repr(model)
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, HQQTensor)}
    assert set(job.quantized_names) == names and "embed.weight" in names and "head.weight" in names
    done = job.progress()
    assert done.done == done.total == calls[-1][0] == calls[-1][1] and [c[2] for c in calls] and done.seconds > 0
    assert str(done).startswith("finished: 100 %")


def test_the_model_answers_while_it_is_quantized() -> None:
    """Each answer is that of some number of layers quantized in order: no layer is ever half of each."""
    model = Tied(layers=6)
    config = HqqConfig(2, 32, skip_modules=["head", "embed"])
    ids = torch.arange(8)
    possible = [model(ids)]
    step = copy.deepcopy(model)
    for i in range(6):
        quantize_(step, config, filter_fn=lambda m, name, i=i: name == f"layers.{i}")
        possible.append(step(ids))
    swapped, answered = threading.Semaphore(0), threading.Semaphore(0)

    def after_each(*_: Any) -> None:
        swapped.release()
        assert answered.acquire(timeout=60)

    job = quantize_in_background(model, config, progress=after_each)
    for i in range(6):
        assert swapped.acquire(timeout=60)
        assert torch.equal(model(ids), possible[i + 1])
        answered.release()
    assert job.wait(60)


def test_answers_of_another_thread_are_finite_and_of_known_layers_while_layers_are_swapped() -> None:
    model = Tied(layers=12)
    want = copy.deepcopy(model)
    quantize_(want, CONFIG)
    ids = torch.arange(4)
    job = quantize_in_background(model, CONFIG)
    answers = [model(ids)]
    while job.state == "running":
        answers.append(model(ids))
    assert job.wait() and all(answer.isfinite().all() for answer in answers)
    assert torch.equal(model(ids), want(ids))


def test_cancelled_it_is_half_quantized_and_another_call_does_the_others() -> None:
    model, ids = Tied(), torch.arange(4)
    want = copy.deepcopy(model)
    quantize_(want, CONFIG)
    jobs: list[Any] = []
    reached, go = threading.Event(), threading.Event()

    def stop(done: int, total: int, name: str) -> None:
        reached.set()
        assert go.wait(60)
        jobs[0].cancel()

    jobs.append(quantize_in_background(model, CONFIG, progress=stop))
    assert reached.wait(60) and not jobs[0].wait(0.01) and jobs[0].state == "running"
    go.set()
    jobs[0].cancel()
    assert jobs[0].wait() and jobs[0].state == "cancelled" and jobs[0].quantized_names == ["layers.0.weight"]
    assert model(ids).isfinite().all()
    with pytest.warns(UserWarning, match="1 weights are quantized already"):
        job = quantize_in_background(model, CONFIG)
    assert job.wait() and same(model, want)


@pytest.mark.parametrize(
    "config, match",
    [("4", "must be an HqqConfig"), (HqqConfig(4, 128), "larger than in_features"),
     (HqqConfig(4, 32, dynamic_config={"nowhere": None}), "match no module")],
)  # fmt: skip
def test_what_cannot_be_done_raises_at_once(config: Any, match: str) -> None:
    model = Tied()
    with pytest.raises((TypeError, ValueError), match=match):
        quantize_in_background(model, config)
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


def test_without_anything_to_quantize_or_without_numbers_it_raises_at_once() -> None:
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_in_background(nn.Sequential(nn.ReLU()), CONFIG)
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(ValueError, match="meta device"):
        quantize_in_background(empty, CONFIG)


def test_nan_is_found_before_the_first_swap() -> None:
    model = Tied()
    with torch.no_grad():
        model.layers[3].weight[0, 0] = float("nan")
    job = quantize_in_background(model, CONFIG)
    with pytest.raises(ValueError, match=r"layers.3.weight: holds NaN"):
        job.wait()
    assert job.state == "failed" and job.quantized_names == [] and "layers.3" in str(job.error)
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


@pytest.mark.parametrize("replace", [False, True])
def test_a_weight_that_changes_meanwhile_stops_it(replace: bool) -> None:
    model = Tied()

    def interfere(done: int, total: int, name: str) -> None:
        if name == "layers.0.weight" and replace:
            model.layers[1].weight = nn.Parameter(torch.zeros(64, 64))

    real = HQQTensor.from_hp

    def change(weight: torch.Tensor, *args: Any, **kwargs: Any) -> HQQTensor:
        if not replace and weight.data_ptr() == model.layers[1].weight.data_ptr():
            with torch.no_grad():
                model.layers[1].weight.add_(1)
        return real(weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HQQTensor, "from_hp", staticmethod(change))
        job = quantize_in_background(model, CONFIG, progress=interfere)
        with pytest.raises(RuntimeError, match=r"layers.1.weight was (changed|replaced)"):
            job.wait(60)
    assert not isinstance(model.layers[1].weight, HQQTensor) and job.quantized_names == ["layers.0.weight"]


def test_an_error_of_the_callback_stops_it() -> None:
    def fail(*_: Any) -> None:
        raise KeyError("mine")

    job = quantize_in_background(Tied(), CONFIG, progress=fail)
    with pytest.raises(KeyError, match="mine"):
        job.wait(60)
    assert job.state == "failed" and len(job.quantized_names) == 1


def test_a_swap_happens_in_all_places_or_in_none() -> None:
    model = Tied()
    old = model.embed.weight
    places = places_by_id(model)[id(old)]
    assert len(places) == 2
    model.head.weight = nn.Parameter(torch.zeros(2048, 64))
    assert not swap_together(places, old, nn.Parameter(torch.ones(2048, 64))) and model.embed.weight is old


def test_dense_memory_goes_back_and_the_process_may_end_meanwhile() -> None:
    code = """
import torch, hqqtensor
from pathlib import Path
from torch import nn
from hqqtensor import HqqConfig, quantize_in_background
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
quantize_in_background(nn.Sequential(nn.Linear(512, 512)), HqqConfig(4, 64)).wait()  # what is made once
before = anonymous()
model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)])
dense = anonymous()
assert quantize_in_background(model, HqqConfig(4, 64)).wait()
after = anonymous()
packed = sum(p.nbytes for p in model.parameters())
print(dense - before, after - before, packed)
assert dense - before > 60e6 and after - before < packed + 20e6, (before, dense, after, packed)
job = quantize_in_background(nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)]), HqqConfig(4, 64))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
