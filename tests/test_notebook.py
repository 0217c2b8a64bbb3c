"""The notebook of examples/notebook: it asks for what there is, and nightly it is run from top to bottom."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import bruno_ray as br

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook" / "organism.ipynb"
OBJECTS = {"br": br, "run": br.Run, "edited": br.EditedModel}
"""What its variables are, or are instances of."""


def code_cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_asks_for_nothing_that_is_not_there() -> None:
    asked = [
        (node.value.id, node.attr)
        for cell in code_cells()
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS
    ]
    assert {name for name, _ in asked} == set(OBJECTS) and len(asked) > 10
    assert [pair for pair in asked if not hasattr(OBJECTS[pair[0]], pair[1])] == []


def test_it_is_kept_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_what_it_says(
    organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The behaviour goes, hidden facts come back, and the baked model says what the live one said."""
    nbclient = pytest.importorskip("nbclient", reason="the extra [docs] is not installed")
    pytest.importorskip("ipykernel", reason="the extra [docs] is not installed")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    last = (
        "print(selected.saved.values['behaviour_rate'], unedited.values['behaviour_rate'], live_answer == baked_answer)"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    after, before, same = notebook.cells[-1].outputs[0].text.split()
    assert float(after) < float(before) and float(before) > 0.8 and same == "True"
