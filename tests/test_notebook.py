"""docs/purify.ipynb runs in a fresh kernel, and what it prints is still so."""

import re

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")  # pip install nbclient ipykernel
nbformat = pytest.importorskip("nbformat")


def printed(notebook):
    """What the cells print, without warnings and progress bars."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_the_notebook_finds_and_removes_the_backdoor():
    notebook = nbformat.read(ROOT / "docs" / "purify.ipynb", as_version=4)
    kept = printed(notebook)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    text = printed(notebook)
    for claim in ("target label: 5", "it no longer works: True"):
        assert claim in kept
        assert claim in text
    before, after = (float(asr) for asr in re.findall(r"ASR +([\d.]+)%", text))
    assert before > 95
    assert after < 3
