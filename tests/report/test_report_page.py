"""The page: every figure can be read back, nothing of a model becomes markup, and it needs no other file."""

import functools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hqqtensor.report import page as pages
from hqqtensor.report import plots

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'$\\frac{<b>\u2028"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Elements, their attributes, text, and the JSON of the page; an element that is closed wrongly is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.json = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json += data
        else:
            self.text.append(data)


def layer(name: str, number: int | None, error: float | None) -> dict[str, Any]:
    return {
        "name": name, "kind": name.rpartition(".")[2], "number": number, "shape": [64, 64], "bits": 4, "group_size": 20,
        "format": "int", "bits_per_weight": 4.5, "bytes": 2304, "saturated": 0.1, "error": error,
    }  # fmt: skip


def figures(name: str = "packed", error: float | None = 0.01) -> dict[str, Any]:
    layers = [layer(f"model.layers.{i}.{kind}", i, error) for i in range(3) for kind in ("q", name)]
    histogram = {"name": name, "codes": [5] * 16, "edges": [0.0, 0.5, 1.0], "after": [3, 4], "before": None}
    return {
        "name": name, "source": name, "architecture": name, "settings": "4 bits", "config": {"nbits": 4, "x": name},
        "versions": {"torch": name},
        "parts": [{"part": "layers", "weights": 9, "code_bytes": 5, "metadata_bytes": 1, "bits_per_weight": 5.3}],
        "layers": [*layers, layer(f"{name}.head", None, error)],
        "worst": [{**histogram, "before": [4, 3]}, histogram],
        "sensitivity": {
            "method": "outputs", "layers": [name, "b"], "estimated": 1, "loss": {"4": [0.1, 0.2], "3": [None, 1]},
        },
        "quality": {"measured": MEASURED, "this": {"bits": 4.4, "kl": 0.2}},
        "comparison": {
            "perplexity_before": 3.0, "perplexity_after": 3.5, "kl": 0.2, "top1_agreement": 0.8, "tokens": 9,
        },
        "texts": {"prompt": name, "original": f"{name} one", "quantized": f"{name} two"},
    }  # fmt: skip


MEASURED = [
    {"setting": "4", "bits": 4.5, "kl": 0.1}, {"setting": "3", "bits": 3.5, "kl": 0.5},
    {"setting": "3 good", "bits": 3.5, "kl": 0.3},
]  # fmt: skip


@functools.cache
def page(name: str = "packed") -> str:
    """The page of ``figures(name)``."""
    return pages.page(figures(name))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("name", ["packed", HOSTILE])
def test_the_figures_are_read_back_as_they_were(name: str) -> None:
    reader = read(page(name))
    assert json.loads(reader.json) == figures(name)
    scripts = [attributes for tag, attributes in reader.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}]


def test_names_of_a_model_are_text_wherever_they_stand() -> None:
    reader = read(page(HOSTILE))
    plain = read(page())
    assert [tag for tag, _ in reader.elements] == [tag for tag, _ in plain.elements]
    assert {key for _, a in reader.elements for key in a} == {key for _, a in plain.elements for key in a}
    assert sum(HOSTILE in text for text in reader.text) >= 10


def test_the_page_needs_nothing_else() -> None:
    text = page()
    for tag, attributes in read(text).elements:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "data", "action"):
                assert value is not None and value.startswith("#"), f"{tag} {key}={value}"
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(a["content"] for tag, a in read(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_every_id_stands_once_and_every_reference_leads_somewhere() -> None:
    text = page()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_drawings_have_no_colours_but_those_of_the_style_sheet() -> None:
    text = page()
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", drawing)) <= {
            "none", "var(--ink)", "var(--grid)", *(f"var(--series-{i})" for i in range(7)),
        }  # fmt: skip
    dark = pages.STYLE.partition("prefers-color-scheme: dark")[2]
    for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert f"{name}:" in pages.STYLE and f"{name}:" in dark


def test_what_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    given = figures(error=None) | {"sensitivity": None, "comparison": None, "texts": None}
    given["quality"]["this"] = None
    text = " ".join(read(pages.page(given)).text)
    assert "no --original was given" in text and "neither --sensitivity nor" in text
    assert "This model's point needs --original and --text." in text


def test_the_same_figures_give_the_same_page() -> None:
    assert pages.page(figures()) == page()


def test_an_error_of_zero_is_drawn() -> None:
    assert "<svg" in plots.error_by_layer([layer("model.layers.0.q", 0, 0.0), layer("model.layers.1.q", 1, 0.1)])


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome in PATH")
@pytest.mark.parametrize(("scheme", "number"), [("light", 1), ("dark", 0)])
def test_a_browser_reads_the_figures_back_in_light_and_dark(scheme: str, number: int, tmp_path: Path) -> None:
    text = page(HOSTILE)
    probe = """<script>
        const style = (e, name) => getComputedStyle(e).getPropertyValue(name);
        const drawn = document.querySelector("svg rect, svg path[style*='series-0']");
        document.body.setAttribute("data-probe", JSON.stringify({
            name: JSON.parse(document.getElementById("figures").textContent).name,
            paper: style(document.body, "background-color"), ink: style(document.body, "color"),
            label: style(document.querySelector("svg text"), "fill"),
            wide: document.documentElement.scrollWidth > window.innerWidth,
            drawings: [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect().height > 50),
        }));
    </script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", probe)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={number}",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # type: ignore[arg-type]
    body = next(attributes for tag, attributes in read(done.stdout).elements if tag == "body")
    told = json.loads(body["data-probe"] or "")
    assert told["name"] == HOSTILE and not told["wide"] and told["drawings"] == [True] * 6
    papers = {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}
    assert told["paper"] == papers[scheme] and told["ink"] == told["label"] != told["paper"]
