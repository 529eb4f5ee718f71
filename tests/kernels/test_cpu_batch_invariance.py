"""HQQTENSOR_BATCH_INVARIANT=1: to the last bit, a row of a product does not depend on the rows beside it."""

import os
import sys

import pytest
from examples import examples
from fresh_python import run_fresh

from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

PROGRAM = """
import sys
sys.path[:0] = {path}
STEP = {step}
import torch
import torch.nn.functional as F
from numerics import K, LAYERS, PATHS, Layer, quantized_weight
from hqqtensor import backend

def product(x, layer, path):
    torch.set_float32_matmul_precision(path.precision)
    return F.linear(x, quantized_weight(layer).to(path.dtype).with_data(activation=path.activation))

def different(layer, path, counts, spoiled=None):
    x = torch.randn(300, K, generator=torch.manual_seed(0)).to(path.dtype)
    if spoiled is not None:
        x[1, 5] = spoiled
    rows = range(0, max(counts), max(counts) // 60 + 1)
    alone = torch.cat([product(x[i : i + 1], layer, path) for i in rows])
    return [M for M in counts
            if not torch.equal(product(x[:M], layer, path)[:: rows.step], alone[: -(-M // rows.step)])]
"""
EVERY_COUNT = """
cases = [(Layer("int", 4, 64, 1), PATHS[0]), (Layer("int", 3, 20, 1), PATHS[2]), (Layer("int", 4, 64, 0), PATHS[5])]
for layer, path in cases:
    assert not (wrong := different(layer, path, [*range(2, 65, STEP), 300])), (layer, path, wrong)
"""
EVERY_PATH = """
for layer in [*LAYERS[:: 4 * STEP], Layer("fp8", 8, 64, 1), Layer("int", 4, 12, 1)]:
    for path in PATHS:
        assert not (wrong := different(layer, path, [2, 5, 17, 300])), (layer, path, wrong)
"""
SPOILED = """
# A row that integers cannot stand for takes the float path alone.
for path in PATHS[:5]:
    tiny = 1e-30 if path.dtype != torch.float16 else 1e-7
    for layer in (Layer("int", 4, 64, 1), Layer("fp8", 8, 64, 1), Layer("int", 4, 64, 0)):
        clean = product(torch.ones(1, K, dtype=path.dtype), layer, path)
        for bad in (torch.nan, torch.inf, tiny):
            x = torch.ones(20, K, dtype=path.dtype)
            x[3] = torch.full((K,), tiny) if bad == tiny else bad
            got = product(x, layer, path)
            assert torch.equal(torch.cat([got[:3], got[4:]]), clean.expand(19, -1)), (layer, path, bad)
"""
PLAIN_PATH = """
with backend("reference"):
    for path in PATHS:
        assert not (wrong := different(Layer("int", 4, 64, 1), path, [2, 5, 17, 64])), (path, wrong)
"""


@pytest.mark.parametrize(
    "part", [EVERY_COUNT, EVERY_PATH, SPOILED, PLAIN_PATH], ids=["counts", "paths", "spoiled", "plain"]
)
def test_a_row_does_not_depend_on_the_number_of_rows(part: str) -> None:
    program = PROGRAM.replace("{path}", repr([entry for entry in sys.path if entry]))
    program = program.replace("{step}", str(3 if examples(3) == 3 else 8))
    done = run_fresh(program + part, HQQTENSOR_BATCH_INVARIANT="1")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(bool(os.environ.get("HQQTENSOR_CPU")), reason="alike on every instruction set")
def test_another_value_is_an_error() -> None:
    done = run_fresh("import hqqtensor.ops", HQQTENSOR_BATCH_INVARIANT="yes")
    assert done.returncode != 0 and "HQQTENSOR_BATCH_INVARIANT must be 0 or 1, got 'yes'" in done.stderr


@pytest.mark.skipif(bool(os.environ.get("HQQTENSOR_CPU")), reason="alike on every instruction set")
def test_vllms_switch_asks_for_it_too() -> None:
    code = "import os, hqqtensor.ops; print(os.environ.get('HQQTENSOR_BATCH_INVARIANT'))"
    for switches, asked in (({}, "None"), ({"HQQTENSOR_BATCH_INVARIANT": "0"}, "0")):
        assert run_fresh(code, **switches).stdout.split()[-1] == asked
        asked = switches.get("HQQTENSOR_BATCH_INVARIANT", "1")
        assert run_fresh(code, VLLM_BATCH_INVARIANT="1", **switches).stdout.split()[-1] == asked
