"""Plots are written from results of the shape that the benchmarks give, and results go into docs/data."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import docs
from benchmarks.docs import figures
from benchmarks.docs.__main__ import main

DATA = Path(docs.__file__).parents[2] / "docs" / "data"
CELLS = [
    {
        "shape": [256, 512],
        "M": M,
        "read GB/s": 40.0,
        "rows": [
            {"name": name, "kind": kind, "computes in": computes, "ms": M * ms, "bytes": 1e6}
            for name, kind, computes, ms in (
                ("4-bit bf16", "ours", "bfloat16", 1.0),
                ("4-bit int8 bf16", "ours", "int8", 0.8),
                ("llama.cpp Q4_K", "peer", "int8", 1.3),
                ("ATen int4pack", "peer", "bfloat16", 1.2),
                ("ONNX Runtime 4-bit int8", "peer", "int8", 2.0),
                ("dense bf16", "dense", "bfloat16", 1.1),
            )
        ],
    }
    for M in (1, 4, 16, 64)
]
GENERATED = [
    {"model": model, "name": name, "kind": kind, "MB": 9.0, "batch": 1, "context": 128, "tokens/s": 30.0,
     "first token, s": 1.5}
    for model in ("SmolLM2", "1B")
    for name, kind in (("hqqtensor", "ours"), ("llama.cpp", "llama.cpp"), ("dense bf16", "dense"))
]  # fmt: skip
SOLVED = [
    {"solver": solver, "shape": [256, 512], "dtype": "fp32", "bits": bits, "M weights/s": 10.0}
    for solver in ("rtn", "hqq_joint", "hqq_joint nf4", "plain rtn", "hqq library")
    for bits in (4, 2)
]
ABOUT = {"date": "2026-11-30", "torch": "2.13.0", "HQQTENSOR_CPU": None}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of docs/data that a test may write to."""
    shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.setattr(figures, "DATA", tmp_path / "data")
    return tmp_path / "data"


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    plot.linear(CELLS, str(tmp_path / "new" / "linear.png"))
    plot.generate(GENERATED, str(tmp_path / "generate.png"))
    plot.quantize(SOLVED, str(tmp_path / "quantize.png"))
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_labels_of_lines_that_end_together_lie_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation, Text

    from benchmarks import plot

    cells = [{**cell, "rows": [{**one, "ms": 1.0} for one in cell["rows"]]} for cell in CELLS]
    figure = plot.layer(figures.from_linear({"cells": cells}))
    figure.canvas.draw()
    labels = [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]
    boxes = sorted((Text.get_window_extent(label) for label in labels), key=lambda box: box.y0)
    assert len(boxes) == 6
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("kind", "results"), [("linear", {"cells": CELLS}), ("generate", GENERATED), ("quantize", {"rows": SOLVED})]
)
def test_a_result_replaces_the_run_of_its_id(data: Path, kind: str, results: dict) -> None:
    before = figures.runs(kind)
    for machine in ("first", "second"):
        figures.record(kind, {"machine": ABOUT, "results": results}, "new", machine)
    after = figures.runs(kind)
    assert list(after) == [*before, "new"] and after["new"]["machine"] == "second"
    assert {id: after[id] for id in before} == before
    assert after["new"]["date"] == "2026-11-30" and after["new"]["versions"] == {"torch": "2.13.0"}


def test_recorded_products_have_a_time_for_each_number_of_tokens(data: Path) -> None:
    figures.record("linear", {"machine": ABOUT, "results": {"cells": CELLS}}, "new", "x")
    run = figures.runs("linear")["new"]
    assert run["tokens"] == [1, 4, 16, 64] and figures.row(run, "4-bit bf16")["ms"] == [1.0, 4.0, 16.0, 64.0]
    peer = figures.fastest_peer(run, 0)
    assert peer is not None and peer["name"] == "ATen int4pack"
    with pytest.raises(KeyError, match="no row 'nothing'"):
        figures.row(run, "nothing")


def test_recorded_solvers_name_their_format(data: Path) -> None:
    figures.record("quantize", {"machine": ABOUT, "results": {"rows": SOLVED}}, "new", "x")
    rows = figures.runs("quantize")["new"]["rows"]
    assert {(r["solver"], r["format"]) for r in rows} == {
        ("rtn", "int"), ("hqq_joint", "int"), ("hqq_joint", "nf4"), ("plain rtn", "int"), ("hqq library", "int"),
    }  # fmt: skip


def test_files_of_figures_are_written_as_they_are(data: Path) -> None:
    for kind in ("linear", "generate", "quantize", "settings"):
        assert figures.as_text(list(figures.runs(kind).values())) == (DATA / f"{kind}.json").read_text()


def test_recording_without_an_id_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"machine": ABOUT, "results": {"cells": CELLS}}))
    with pytest.raises(SystemExit):
        main(["--record", "linear", str(tmp_path / "result.json")])
    assert "--id" in capsys.readouterr().err
