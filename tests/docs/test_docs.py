"""The documentation holds: its Python runs, its links lead somewhere, its generated parts are what the sources give."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hqqtensor
from benchmarks.docs import api, pages, plots
from hqqtensor.cli import main as command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = pages.pages()
LANGUAGES = {"python", "sh", "text"}
COMMANDS = (
    "quantize", "convert", "inspect", "eval", "compare", "recommend", "chat", "generate", "serve", "bench", "report",
    "card", "completion", "env", "pack", "unpack",
)  # fmt: skip
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line before it."""

    language: str
    text: str
    before: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; a fence that is not closed is an error."""
    lines, i = page.read_text(encoding="utf-8").splitlines(), 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].startswith("```")), None)
            assert end is not None, f"{name_of(page)}: line {i + 1} opens a block that nothing closes"
            yield Block(lines[i][3:].strip(), "\n".join(lines[i + 1 : end]) + "\n", lines[i - 1] if i else "")
            i = end
        i += 1


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def runs(page: Path) -> list[str]:
    """The Python blocks of a page that are not marked as not run."""
    return [b.text for b in blocks(page) if b.language == "python" and not NOT_RUN.fullmatch(b.before)]


def anchors(page: Path) -> set[str]:
    """The names that a link to a heading of the page may have, as GitHub gives them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        unique, count = slug, 0
        while unique in found:
            count += 1
            unique = f"{slug}-{count}"
        found.add(unique)
    return found


def links(page: Path) -> list[tuple[Path, str]]:
    """File and heading of every relative link and picture of a page."""
    out = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            out.append(((page.parent / path).resolve() if path else page, heading))
    return out


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for text in runs(page):
        exec(compile(text, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_and_python_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.language!r} is none of {sorted(LANGUAGES)}:\n{block.text}"
        if block.language == "python":
            ast.parse(block.text)
        else:
            assert not NOT_RUN.fullmatch(block.before), f"only Python blocks run:\n{block.text}"


def test_pages_whose_python_runs_are_not_lost() -> None:
    skipped = [(name_of(p), b.before) for p in PAGES for b in blocks(p) if NOT_RUN.fullmatch(b.before)]
    several_processes = ["docs/distributed.md"] * 6  # which an example and tests run
    others = ["docs/embeddings.md", *["docs/export.md"] * 2, "docs/hqq_checkpoints.md", *["docs/peft.md"] * 5]
    assert [name for name, _ in skipped] == several_processes + others
    for page in ("README.md", "docs/quickstart.md", "docs/configuration.md", "docs/transformers.md", "docs/quality.md"):
        assert runs(ROOT / page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for path, heading in links(page):
        assert path.exists(), f"{name_of(page)} links to {path}, which is not there"
        if heading:
            assert heading in anchors(path), f"{path.name} has no heading #{heading}; it has {sorted(anchors(path))}"


def test_every_page_is_reached_from_the_index() -> None:
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            todo += [path for path, _ in links(page) if path.suffix == ".md" and path.exists()]
    assert [name_of(p) for p in PAGES if p.resolve() not in seen and p.name != "README.md"] == []
    assert DOCS / "index.md" in {path for path, _ in links(ROOT / "README.md")}


def test_every_plot_is_shown() -> None:
    shown = {path.name for page in PAGES for path, _ in links(page) if path.parent == plots.FOLDER}
    assert shown == set(plots.PLOTS)


def test_pages_are_what_figures_and_docstrings_give() -> None:
    assert [name_of(p) for p in pages.stale()] == [], "run: python -m benchmarks.docs"


def test_plots_are_drawn_from_the_figures() -> None:
    assert plots.stale() == [], "run: python -m benchmarks.docs (with matplotlib)"


def test_a_page_with_another_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(pages.generated(DOCS / "performance.md").replace("0.82 |", "0.28 |", 1))
    monkeypatch.setattr(pages, "pages", lambda: [page])
    assert page in pages.stale()


def test_every_public_name_is_explained_outside_of_the_reference() -> None:
    code = [b.text for p in PAGES if p != pages.API for b in blocks(p) if b.language == "python"]
    code += [span for p in PAGES if p != pages.API for span in re.findall(r"`([^`\n]+)`", prose(p))]
    used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(code)))
    assert [name for name in hqqtensor.__all__ if name not in used] == []


def test_the_reference_has_every_public_name() -> None:
    assert api.public_names("hqqtensor") == sorted(hqqtensor.__all__, key=str.lower)
    headings = re.findall(r"^### (\w+)$", pages.API.read_text(), re.M)
    assert headings == [name for module in api.MODULES for name in api.public_names(module)]


def test_modules_that_pages_import_from_are_in_the_reference() -> None:
    imported = {
        (node.module, alias.name)
        for page in PAGES
        for text in runs(page)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hqqtensor")
        for alias in node.names
    }
    not_for_users = {("hqqtensor.serialization.hqq_export", "export_layer"), ("hqqtensor.formats", "FP8")}
    known = {(module, name) for module in api.MODULES for name in api.public_names(module)}
    assert imported - known == not_for_users


def test_every_option_is_in_the_table_of_settings() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", (DOCS / "configuration.md").read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert [name for name in (*hqqtensor.HqqConfig().to_dict(), "weight_quant_params") if name not in listed] == []


def options(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    assert command([name, "--help"]) == 0
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


def test_every_option_of_the_commands_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "cli.md").read_text()
    for name in COMMANDS:
        assert f"`hqqtensor {name}" in text
        missing = {option for option in options(name, capsys) - {"--help"} if f"`{option}" not in text}
        assert missing == set(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_pages_have_the_options_they_use(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for b in blocks(page) if b.language == "sh" for line in b.text.splitlines()]
    lines += re.findall(r"`(hqqtensor [a-z]+[^`\n]*)`", prose(page))
    for line in lines:
        if line.startswith("hqqtensor ") and not line.startswith("hqqtensor -"):
            _, name, *rest = shlex.split(line, comments=True)
            assert name in COMMANDS, line
            assert {word for word in rest if word.startswith("--")} <= options(name, capsys), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_speaks_of_what_a_reader_cannot_see(page: Path) -> None:
    text = page.read_text(encoding="utf-8").lower()
    assert [word for word in ("asked for", "not met", "design.md", "/work/", "part 4") if word in text] == []
