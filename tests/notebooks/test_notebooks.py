"""The notebooks run top to bottom offline, define nothing long, and are committed without outputs."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LAST = pytest.param(NOTEBOOKS[-1], marks=pytest.mark.one_of_each, id=NOTEBOOKS[-1].stem)  # the shortest
MINUTES = 4.0  # in CI, where another process runs beside it; alone each takes less than 2


def code(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_is_one_for_each_thing_to_look_at() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["01_prompt_encoding", "02_inspect_a_run", "03_sample_and_score", "04_tables"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_longer_than_ten_lines_belongs_into_the_package(path: Path) -> None:
    for source in code(path):
        python = "\n".join(line for line in source.splitlines() if not line.startswith(("!", "%")))
        assert len(source.splitlines()) <= 14, "a cell to read at a glance"
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 10


@pytest.mark.slow
@pytest.mark.parametrize("path", [*NOTEBOOKS[:-1], LAST], ids=lambda path: path.stem)
def test_a_notebook_runs_offline_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook, start = nbformat.read(path, as_version=4), time.monotonic()
    NotebookClient(notebook, timeout=60 * MINUTES, resources={"metadata": {"path": str(FOLDER)}}).execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" and "Error" in output.text for output in said)
    assert time.monotonic() - start < 60 * MINUTES
    pictures = sum("image/png" in output.get("data", {}) for output in said)
    assert pictures >= 1
