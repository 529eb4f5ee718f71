"""The choice of a backend is one for Python and the compiled kernels, in threads, asyncio tasks and graphs."""

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor, backend, ops, set_backend
from hqqtensor.cli.env import collect
from hqqtensor.kernels import cpu
from hqqtensor.ops.backend import _BACKENDS, Backend, chosen, register_backend

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

W = HQQTensor.from_hp(torch.randn(16, 64, generator=torch.manual_seed(0)), HqqConfig(4, 32)).operand()
X = torch.randn(2, 64, generator=torch.manual_seed(1))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backend that each product went to, the compiled kernels without the registry as "direct"."""
    calls: list[str] = []
    for name in ("cpu", "reference"):
        kernels = dict(_BACKENDS[name].kernels)

        def linear(*args: object, name: str = name, run: object = kernels["linear"]) -> Tensor:
            calls.append(name)
            return run(*args)  # type: ignore[operator]

        monkeypatch.setitem(_BACKENDS, name, replace(_BACKENDS[name], kernels={**kernels, "linear": linear}))
    yield calls
    set_backend("auto")


def went_to(seen: list[str]) -> str:
    before = len(seen)
    ops.linear(X, W)
    return seen[-1] if len(seen) > before else "direct"


def test_the_plain_path_is_called_reference_and_answers_to_its_former_name(seen: list[str]) -> None:
    for name in ("reference", "dequantize"):
        with backend(name):
            assert chosen() == "reference" and went_to(seen) == "reference"
        set_backend(name)
        assert went_to(seen) == "reference"
        set_backend("auto")
    with pytest.raises(ValueError, match=r"must be one of \['auto', 'reference', 'cpu', 'triton'\], got 'nothing'"):
        set_backend("nothing")
    with pytest.raises(ValueError, match=r"must be one of .*, got \[\]"):
        set_backend([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'dequantize' is already registered"):
        register_backend(Backend("dequantize", {}))
    assert "reference" in [b["name"] for b in collect()["backends"]]


def test_a_block_ends_where_it_began(seen: list[str]) -> None:
    assert went_to(seen) == "direct"
    with backend("reference"):
        assert went_to(seen) == "reference"
        with backend("auto"):
            assert went_to(seen) == "cpu"
        with contextlib.suppress(KeyError), backend("cpu"):
            assert went_to(seen) == "cpu"
            raise KeyError
        assert went_to(seen) == "reference"
    assert went_to(seen) == "direct"


def test_the_choice_of_the_process_is_that_of_blocks_left(seen: list[str]) -> None:
    set_backend("cpu")
    assert went_to(seen) == "direct"
    set_backend("reference")
    assert went_to(seen) == "reference"
    with backend("cpu"):
        assert went_to(seen) == "cpu"
    assert went_to(seen) == "reference"


def test_asyncio_tasks_that_interleave_keep_their_own_choice(seen: list[str]) -> None:
    async def task(name: str, expected: str) -> list[str]:
        found = []
        with backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(went_to(seen))
        return [f for f in found if f != expected]

    async def plain() -> list[str]:
        found = []
        for _ in range(9):
            await asyncio.sleep(0)
            found.append(went_to(seen))
        return [f for f in found if f == "reference"]

    async def run() -> list[list[str]]:
        return await asyncio.gather(task("reference", "reference"), plain(), task("cpu", "cpu"), task("auto", "cpu"))

    assert asyncio.run(run()) == [[], [], [], []]
    assert went_to(seen) == "direct"


def test_a_task_started_in_a_block_keeps_the_choice_when_the_block_is_left(seen: list[str]) -> None:
    async def run() -> tuple[str, str]:
        started = asyncio.Event()

        async def late() -> str:
            await started.wait()
            return went_to(seen)

        with backend("reference"):
            task = asyncio.create_task(late())
        here = went_to(seen)
        started.set()
        return here, await task

    assert asyncio.run(run()) == ("cpu", "reference")
    gc.collect()
    assert went_to(seen) == "direct"


def test_threads_do_not_see_each_others_choice(seen: list[str]) -> None:
    in_block, done = threading.Event(), threading.Event()
    found: dict[str, str] = {}

    def chooses() -> None:
        with backend("reference"):
            in_block.set()
            done.wait()
            found["chooses"] = went_to(seen)

    thread = threading.Thread(target=chooses)
    thread.start()
    in_block.wait()
    found["main"] = went_to(seen)
    done.set()
    thread.join()
    assert found == {"main": "cpu", "chooses": "reference"}
    assert went_to(seen) == "direct"


def test_a_compiled_graph_follows_the_choice(seen: list[str]) -> None:
    torch._dynamo.reset()
    graph = torch.compile(lambda x: ops.linear(x, W) + 1, backend="aot_eager", fullgraph=True)
    want = graph(X)
    assert not seen
    with backend("reference"):
        torch.testing.assert_close(graph(X), want)
    assert seen == ["reference"]


def test_a_backend_registered_later_for_cpus_is_asked_first(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hqqtensor.ops.backend"], "_BACKENDS", dict(_BACKENDS))
    asked = []

    def linear(x: Tensor, *args: object) -> Tensor:
        asked.append(x.shape[0])
        return NotImplemented if x.shape[0] > 1 else x.new_zeros(1, 16)

    register_backend(Backend("mine", {"linear": linear}, ("cpu",)))
    try:
        assert not ops.linear(X[:1], W).any()
        torch.testing.assert_close(ops.linear(X, W), X @ ops.dequantize(W, torch.float32).T, atol=1e-4, rtol=1e-4)
        assert asked == [1, 2]
        with backend("mine"), pytest.raises(RuntimeError, match=r"'mine' has no kernel for 'linear' with format 'int'"):
            ops.linear(X, W)
    finally:
        monkeypatch.undo()
        set_backend("auto")


def test_what_a_chosen_backend_does_not_serve_is_an_error_that_says_so() -> None:
    with backend("cpu"):
        with pytest.raises(
            RuntimeError, match=r"'cpu' has no kernel for 'linear' with format 'int' of 4 bits and torch.float64"
        ):
            ops.linear(X.double(), W)
        with pytest.raises(RuntimeError, match=r"'cpu' has no kernel for 'dequantize' .* torch.float64"):
            ops.dequantize(W, torch.float64)
    want = X.double() @ ops.dequantize(W, torch.float64).T
    torch.testing.assert_close(ops.linear(X.double(), W), want)
