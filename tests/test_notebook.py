"""docs/tutorial.ipynb: executed in a kernel, as Jupyter does it, in a clone of its own."""

import re

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "docs/tutorial.ipynb"
# what the notebook reads of the repository
READ = ("common", "data", "evaluation", "lm", "models", "reasoning", "reward_model", "search")


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_stored_without_outputs_and_begins_with_the_one_line():
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "sys.path.insert" in code[0].source and len(code[0].source.splitlines()) == 1
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.process
def test_it_trains_judges_searches_and_plots(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name in (*READ, "trainer"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    notebook = read()
    where = {"metadata": {"path": str(tmp_path / "docs")}}
    NotebookClient(notebook, timeout=600, resources=where).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert (tmp_path / "saved_model/notebook/model.safetensors").is_file()
    assert (tmp_path / "saved_model/notebook/training.png").is_file()

    scores = {
        step: float(value) for value, step in re.findall(r"^ *(\d\.\d+)  (.+)$", printed, re.M)
    }
    assert scores["Step 1: 6 * 3 = 18"] > 0.8 and scores["Answer: 23"] > 0.8
    assert scores["Step 1: 6 + 3 = 9"] < 0.2 and scores["Answer: 14"] < 0.2
    rates = {
        name: float(value)
        for name, value in re.findall(r"^((?:base|tuned)_\w+) +(\d\.\d+) \[", printed, re.M)
    }
    assert len(rates) == 4
    assert rates["base_step_greedy"] > rates["base_greedy"] > 0.2
    assert rates["tuned_greedy"] > rates["base_greedy"]
