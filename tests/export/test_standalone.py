"""Processes that load the library of kernels and do not import hqqtensor: its operators, and what is not there."""

import json
from pathlib import Path

import pytest
import torch
from fresh_python import run_fresh
from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

DEFINE = """
import ctypes, sys
import torch
library = ctypes.CDLL(sys.argv[1])
assert library.hqqtensor_define_operators() == 0
"""


def schemas() -> dict[str, str]:
    """Of the public operators, those that have a twin for the registry, and of the products without gradient."""
    defined = {s.name: str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("hqqtensor::")}
    public = [name.replace("registry_", "") for name in defined if name.startswith("hqqtensor::registry_")]
    names = {*public, *(name.replace("::", "::_") for name in public)}
    return {name: schema for name, schema in defined.items() if name in names}


def test_the_operators_are_those_that_python_defines() -> None:
    code = """
    import json
    assert library.hqqtensor_define_operators() == 0  # again
    print(json.dumps({s.name: str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("hqqtensor::")}))
    """
    done = run_fresh(DEFINE + "\n".join(line.strip() for line in code.splitlines()), cpu.LIBRARY)
    assert done.returncode == 0, done.stderr
    defined, wanted = json.loads(done.stdout), schemas()
    assert {name: defined.get(name) for name in wanted} == wanted
    assert len(wanted) >= 12


def test_a_traced_module_runs_without_the_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(3, 64)
    quantize_(m, HqqConfig(4, 32))
    with torch.no_grad():
        traced = torch.jit.trace(m, (x,))
        other = torch.randn(2, 5, 64)
        assert torch.equal(traced(other), m(other))
        traced.save(str(tmp_path / "m.pt"))
        torch.save((x, m(x)), tmp_path / "want.pt")
    code = DEFINE + (
        "x, want = torch.load(sys.argv[2] + '/want.pt')\n"
        "assert torch.equal(torch.jit.load(sys.argv[2] + '/m.pt')(x), want)\n"
        "assert 'hqqtensor' not in sys.modules\n"
    )
    done = run_fresh(code, cpu.LIBRARY, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_format_whose_table_python_has_is_one_clear_error() -> None:
    code = DEFINE + (
        "q, scale = torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1)\n"
        "torch.ops.hqqtensor.dequantize(q, scale, None, None, 4, 'nf4', 16, 1, 16, torch.float32)\n"
    )
    done = run_fresh(code, cpu.LIBRARY)
    assert done.returncode == 1
    assert "hqqtensor::dequantize: the compiled kernels do not serve this dtype or format" in done.stderr
    assert "Python package hqqtensor, which does, is not imported" in done.stderr


def test_the_package_cannot_be_imported_after_that_and_says_so() -> None:
    done = run_fresh(DEFINE + "import hqqtensor.ops\n", cpu.LIBRARY)
    assert done.returncode == 1
    assert "import hqqtensor instead of calling it" in done.stderr.splitlines()[-1]


def test_where_the_package_is_imported_the_call_does_nothing() -> None:
    done = run_fresh("import hqqtensor.ops\n" + DEFINE + "torch.ops.hqqtensor.linear.default\n", cpu.LIBRARY)
    assert done.returncode == 0, done.stderr
