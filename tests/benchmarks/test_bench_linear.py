"""benchmarks.cpu_linear: answers are checked, figures are those that were measured, the verdict follows from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_linear, ours, peers
from benchmarks.contender import Contender, WrongAnswer, bound_and_checked
from benchmarks.linear_verdict import verdict

TINY = ["--shapes", "256x512", "--tokens", "1", "4", "--bits", "4", "3", "--seconds", "0.01"]


def dense_like(w: torch.Tensor, answer: Any = None, precision: str = "float32") -> Contender:
    """A contender that multiplies by ``w``, with ``answer`` applied to the product."""

    def bind(x: torch.Tensor) -> Any:
        return lambda: (answer or (lambda y: y))(x @ w.T)

    return Contender("mine", "peer", 32, precision, w.nbytes, bind, lambda: w)


def one_wrong(y: torch.Tensor) -> torch.Tensor:
    return torch.cat([y[:, :-1], -y[:, -1:]], 1)


def test_main_checks_times_and_writes_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu_linear.main([*TINY, "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    cells = written["results"]["cells"]
    assert [(c["shape"], c["M"]) for c in cells] == [([256, 512], 1), ([256, 512], 4)]
    names = {row["name"] for row in cells[0]["rows"]}
    assert {"4-bit fp32", "3-bit bf16", "4-bit axis 0 fp32", "dense fp32", "dense bf16", "ATen int4pack"} <= names
    four = next(r for r in cells[0]["rows"] if r["name"] == "4-bit fp32")
    assert four["bytes"] == 256 * 512 // 2 + 2 * 2 * 256 * 8
    share = four["bytes"] / (four["ms"] * 1e-3) / (cells[0]["read GB/s"] * 1e9)
    assert four["of read bandwidth"] == pytest.approx(share)
    assert all(row["ms"] > 0 for cell in cells for row in cell["rows"])
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert any("eager overhead" in line["aim"] for line in written["results"]["verdict"])
    shown = capsys.readouterr().out
    assert all(f"left out: {name}" in shown for name in written["results"]["missing"])


def test_a_wrong_peer_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "all_peers", lambda w: ([dense_like(w, one_wrong)], {}))
    with pytest.raises(WrongAnswer, match="mine, M=1"):
        cpu_linear.main(TINY)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "answer",
    [one_wrong, lambda y: y * 1.5, lambda y: y * float("nan"), lambda y: y[:, :-1], torch.zeros_like],
    ids=["one output wrong", "scaled", "nan", "short", "zero"],
)
def test_wrong_answers_are_caught_at_every_precision(answer: Any, precision: str) -> None:
    w, x = torch.randn(96, 64), torch.randn(4, 64)
    with pytest.raises(WrongAnswer):
        bound_and_checked(dense_like(w, answer, precision), {1: x[:1], 4: x})


def test_a_right_answer_passes() -> None:
    w, x = torch.randn(96, 64), torch.randn(4, 64)
    runs = bound_and_checked(dense_like(w), {1: x[:1], 4: x})
    assert runs[4]().shape == (4, 96)


def test_every_copy_of_ours_gives_the_same_answer() -> None:
    w, x = torch.randn(64, 128), torch.randn(3, 128)
    (c,) = ours.contenders(w, 4, ["fp32"])
    run = c.bind(x)
    first = run().clone()
    assert all(torch.equal(run(), first) for _ in range(40))


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_each_installed_peer_multiplies_by_the_weight_it_reports(name: str) -> None:
    w = torch.randn(128, 512, generator=torch.manual_seed(0)) * 0.02
    try:
        found = peers.PEERS[name].contenders(w)
    except peers.NotHere as error:
        pytest.skip(str(error))
    x = torch.randn(4, 512)
    for c in found:
        bound_and_checked(c, {1: x[:1], 4: x})
        limit = 0.02 if c.nbits == 8 else 0.13
        assert (c.dense() - w).norm() < limit * w.norm(), c.name
        assert 1 < 8 * c.nbytes / w.numel() / c.nbits < 1.3, c.name


def cell(M: int, **times: tuple[float, float]) -> dict[str, Any]:
    """A cell of (ms, bytes in units of those of 4 bits) by name, "_" for a space."""
    kinds = {"ATen": "peer", "dense": "dense"}
    rows = []
    for name, (ms, size) in times.items():
        name = name.replace("_", " ").replace("four", "4-bit").replace("three", "3-bit").replace("two", "2-bit")
        kind = kinds.get(name.split()[0], "ours")
        row = {"name": name, "kind": kind, "ms": ms, "bytes": size * 1000, "computes in": "float32"}
        rows.append({**row, "of read bandwidth": size * 0.9 / ms})
    return {"shape": [11008, 4096], "M": M, "rows": rows}


def test_verdict_passes_and_fails_by_the_figures() -> None:
    one = cell(
        1, four_fp32=(1, 1), three_fp32=(0.8, 0.78), two_fp32=(0.75, 0.55), four_g32_fp32=(1.3, 1.1),
        four_axis_0_fp32=(1.02, 1), ATen_int4pack=(1.39, 1), dense_fp32=(5, 7),
    )  # fmt: skip
    many = cell(16, four_fp32=(2, 1), ATen_int4pack=(2.5, 1), dense_fp32=(1.9, 7))
    got = {line["aim"]: line["pass"] for line in verdict([one, many])}
    assert got["M=1, 4-bit g64 fp32: >= 85 % of the read bandwidth"]
    assert not got["M=1, 4-bit g64 fp32: >= 1.4 x the fastest peer"]
    assert got["M=1, 3-bit fp32: <= 0.85 x the 4-bit time"]
    assert not got["M=1, 2-bit fp32: <= 0.7 x the 4-bit time"]
    assert not got["M=1, 4-bit g32 fp32: <= 1.15 x what its bytes imply"]
    assert got["M=1, 4-bit axis 0 fp32: no slower than axis 1"]
    assert got["M=16, 11008x4096, 4-bit exact: faster than every peer"]
    assert not got["M=16, 11008x4096: every setting faster than dense fp32"]
