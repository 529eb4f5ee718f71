"""benchmarks.cpu_quantize: results are checked, speeds and memory reported, wrong or unsteady solvers caught."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_quantize
from benchmarks.contender import NotHere, WrongAnswer
from benchmarks.peers import hqq_solver
from hqqtensor import HqqConfig, HQQTensor


def test_main_writes_a_row_for_each_solver_and_an_aim_for_each_speed(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ["--shapes", "256x256", "--bits", "4", "2", "--dtypes", "fp32", "bf16", "--seconds", "0.01"]
    cpu_quantize.main([*arguments, "--solvers", "rtn", "hqq_joint", "--formats", "nf4", "fp6", "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    rows = {(r["solver"], r["dtype"], r["bits"]): r for r in results["rows"]}
    assert {("rtn", "fp32", 4), ("hqq_joint", "bf16", 4), ("plain rtn", "fp32", 2)} <= set(rows)
    assert {("hqq_joint nf4", "fp32", 4), ("hqq_joint fp6", "fp32", 6), ("plain hqq_joint fp6", "fp32", 6)} <= set(rows)
    assert rows["hqq_joint nf4", "fp32", 4]["error"] > rows["hqq_joint fp6", "fp32", 6]["error"]
    assert rows["rtn", "fp32", 4]["error"] > rows["hqq_joint", "fp32", 4]["error"] > 0
    assert all(r["M weights/s"] > 0 for r in rows.values())
    assert sum("M weights a second" in line["aim"] for line in results["verdict"]) == 6


class Broken:
    """HQQTensor with a fault in what ``from_hp`` gives."""

    def __init__(self, fault: Any) -> None:
        self.fault, self.calls = fault, 0

    def from_hp(self, w: torch.Tensor, config: HqqConfig) -> HQQTensor:
        q = HQQTensor.from_hp(w, config)
        self.calls += 1
        return self.fault(q, self.calls)


def test_a_solver_with_a_larger_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = lambda q, calls: q.with_data(scale=q.scale * 1.1) if calls == 1 else q  # noqa: E731  ours, not the plain path
    monkeypatch.setattr(cpu_quantize, "HQQTensor", Broken(fault))
    with pytest.raises(WrongAnswer, match="the plain path has"):
        cpu_quantize.check(torch.randn(32, 128), HqqConfig(4, 64, solver="rtn"))


def test_a_solver_that_depends_on_the_number_of_threads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    fault = lambda q, calls: q if torch.get_num_threads() == threads else q.with_data(qdata=q.qdata ^ 1)  # noqa: E731
    monkeypatch.setattr(cpu_quantize, "HQQTensor", Broken(fault))
    with pytest.raises(WrongAnswer, match="threads differ"):
        cpu_quantize.check(torch.randn(32, 128), HqqConfig(4, 64, solver="rtn"))
    assert torch.get_num_threads() == threads


def test_our_published_solver_has_the_librarys_error() -> None:
    w = torch.randn(64, 256, generator=torch.manual_seed(0)) * 0.02
    try:
        _, dequantized = hqq_solver.solver(w, 4, 64)
    except NotHere as error:
        pytest.skip(str(error))
    config = HqqConfig(4, 64, solver="hqq", scale_dtype=torch.float32)
    mine = cpu_quantize.relative_error(HQQTensor.from_hp(w, config).dequantize(), w)
    assert mine == pytest.approx(cpu_quantize.relative_error(dequantized(), w), rel=1e-2)
