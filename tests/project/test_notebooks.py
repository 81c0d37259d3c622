"""The notebooks of examples/notebooks run from end to end, and what is stored in them is fit to be shown."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return found


def kinds(outputs: list[Any]) -> set[str]:
    """What a cell shows: text, pictures."""
    return {"picture" if "image/png" in output.get("data", {}) else output["output_type"] for output in outputs}


def test_there_are_two():
    assert NAMES == ["first_head", "folder_to_search"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_and_outputs_name_no_place_of_a_machine(name):
    texts = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) >= 4
    for link in links:
        assert (FOLDER / link.partition("#")[0]).is_file(), link
    outputs = [output for cell in cells(name) for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    said = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not re.findall(r"(?<![\w.:/<])/(?:\w[\w.-]*/)+[\w.-]+|0x[0-9a-f]{6,}", said)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_is_stored(name):
    program = runpy.run_path(str(FOLDER / "run.py"))
    found = program["run"](name)
    stored = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    ran = [cell for cell in found.cells if cell["cell_type"] == "code"]
    assert [kinds(cell["outputs"]) for cell in ran] == [kinds(cell["outputs"]) for cell in stored]
    assert any("picture" in kinds(cell["outputs"]) for cell in ran)
