"""The scripts under docs/examples run."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py"))
SHORT = {"finetune_lora": (2, 2, 64, 4), "denoiser": (3,)}
NEEDS = {"finetune_lora": "peft", "embeddings": "sentence_transformers"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_page_leads_to_the_example(path: Path) -> None:
    pages = path.parents[1].glob("*.md")
    assert any(f"](examples/{path.name})" in page.read_text() for page in pages)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*SHORT.get(path.stem, ()))
    assert capsys.readouterr().out.strip()
