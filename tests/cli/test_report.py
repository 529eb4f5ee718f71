"""``report``: the figures of the page are those of the model."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hqqtensor import collect_quantization_debug_info
from hqqtensor.cli import main, model_dir, report
from hqqtensor.search import measure_sensitivity

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

DOCLM = Path(__file__).parent.parent / "assets" / "doclm"
TEXT = ["--text", str(DOCLM / "valid.txt"), "--context", "32", "--max-tokens", "320"]


class FiguresReader(HTMLParser):
    """The JSON within a page."""

    text, here = "", False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.here = ("id", "figures") in attrs

    def handle_data(self, data: str) -> None:
        self.text += data if self.here else ""

    def handle_endtag(self, tag: str) -> None:
        self.here = False


def figures_in(page: Path) -> dict:
    reader = FiguresReader()
    reader.feed(page.read_text(encoding="utf-8"))
    return json.loads(reader.text)


def test_a_page_with_an_original_has_all_figures(small: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "MEASURING_SECONDS", 0.01)
    out = tmp_path / "page.html"
    command = ["report", str(small / "packed"), "--original", str(small / "dense"), *TEXT, "-o", str(out)]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    figures = figures_in(out)
    assert told == {"page": str(out), **figures}
    packed, dense = model_dir.open_quantized(small / "packed"), model_dir.open_dense(small / "dense")
    infos = collect_quantization_debug_info(packed, dense).modules
    assert [(x["name"], x["bytes"], x["error"]) for x in figures["layers"]] == [
        (info.name, info.nbytes, info.relative_error) for info in infos
    ]
    worst = max(infos, key=lambda info: info.relative_error or 0)
    shown = figures["worst"][0]
    assert len(figures["worst"]) == 3 and shown["name"] == worst.name
    weights = packed.get_submodule(worst.name).weight
    assert sum(shown["codes"]) == weights.numel() and len(shown["codes"]) == 16
    assert sum(shown["before"]) >= 0.99 * weights.numel()
    sensitivity = figures["sensitivity"]
    assert len(sensitivity["layers"]) == len(infos) - 2 and sensitivity["estimated"] > 0
    assert figures["quality"]["this"]["kl"] == figures["comparison"]["kl"] > 0
    assert figures["texts"]["original"] and figures["texts"]["quantized"]
    assert figures["parts"][0]["part"] == "layers" and figures["versions"]["torch"] == str(torch.__version__)


def test_a_page_needs_the_model_alone(small: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(small / "packed"), "-p", "The list"]) == 0
    assert "wrote packed-report.html: 16 quantized weights" in capsys.readouterr().out
    figures = figures_in(tmp_path / "packed-report.html")
    assert figures["comparison"] is None and figures["sensitivity"] is None and figures["quality"]["this"] is None
    assert all(layer["error"] is None for layer in figures["layers"]) and figures["worst"][0]["before"] is None
    assert figures["texts"]["original"] is None and figures["texts"]["quantized"]


def test_measurements_of_a_search_are_drawn(small: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    measured = measure_sensitivity(model_dir.open_dense(small / "dense"), file=tmp_path / "s.json")
    assert main(["report", str(small / "packed"), "--sensitivity", "s.json"]) == 0
    figures = figures_in(tmp_path / "packed-report.html")["sensitivity"]
    assert figures["layers"] == list(measured.layers) and figures["method"] == "weights" and figures["estimated"] == 0
    of_four = [i for i, candidate in enumerate(measured.candidates) if candidate["nbits"] == 4]
    first = next(iter(measured.layers.values()))
    assert figures["loss"]["4"][0] == min(first["loss"][i] for i in of_four if first["loss"][i] is not None)


def test_a_missing_matplotlib_is_named_with_what_installs_it(small: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(small / "packed")]) == 1
    assert "pip install 'hqqtensor[report]'" in capsys.readouterr().err
