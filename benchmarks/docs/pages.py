"""The generated tables in the pages: each stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.docs import api, errors, speed, verdicts

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api.md"
README_ROWS = (speed.BF16, speed.INT8, "llama.cpp Q4_K", "ATen int4pack", "dense bf16", "hqq")
TABLES: dict[str, Callable[[], str]] = {
    "summary": verdicts.summary,
    "shortfalls": verdicts.shortfalls,
    "against others": speed.against_peers,
    "layer, AMD": lambda: speed.layer("zen4"),
    "layer, AMD, short": lambda: speed.layer("zen4", (1, 4, 16, 128), README_ROWS),
    "layer, Intel": lambda: speed.layer("intel"),
    "layer, AVX2": lambda: speed.layer("zen3"),
    "every row, AMD": lambda: speed.every_row("zen4"),
    "every row, Intel": lambda: speed.every_row("intel"),
    "every row, AVX2": lambda: speed.every_row("zen3"),
    "speed of settings": speed.settings,
    "speed of small groups": speed.small_groups,
    "generate": lambda: speed.generate("intel"),
    "generate, AVX2": lambda: speed.generate("zen3"),
    "quantize": speed.quantize,
    "settings by error": errors.settings,
    "errors at equal bits": errors.at_equal_bits,
    "errors, short": errors.readme,
    "chat model": errors.chat_model,
    "chat model, short": errors.chat_model_short,
    "agreement": errors.agreement,
    "answers": errors.side_by_side,
    "every method, doclm": lambda: errors.every_method("doclm"),
    "every method, MiniLM": lambda: errors.every_method("MiniLM"),
}
_BLOCK = re.compile(r"<!-- table: (?P<name>[^\n]*?) -->\n.*?<!-- end of table -->", re.S)


def pages() -> list[Path]:
    """Every Markdown file of the documentation."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def generated(page: Path) -> str:
    """The text of a page with its tables made anew; KeyError for a table that nothing makes."""
    if page == API:
        return api.page()

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise KeyError(f"{page.name}: no table {name!r}; there are {sorted(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end of table -->"

    return _BLOCK.sub(block, page.read_text(encoding="utf-8"))


def stale() -> list[Path]:
    """Pages that differ from what the figures and docstrings give."""
    return [
        page for page in {*pages(), API} if not page.is_file() or page.read_text(encoding="utf-8") != generated(page)
    ]


def write() -> list[Path]:
    """Write the pages that are stale; returns them."""
    changed = stale()
    for page in changed:
        page.write_text(generated(page), encoding="utf-8")
    return changed
