"""What a host of repositories reads: its workflow runs commands that exist, with the versions that the project states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import partial_fc

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_runs_what_exists_with_the_versions_that_are_stated():
    workflow = read(".github/workflows/checks.yml")
    jobs = workflow["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = {path for text in commands for path in re.findall(r"(?<![\w/])\.ci/[\w.]+", text)}
    named |= {path for text in commands for path in re.findall(r"(?<![\w/])launch/\w+", text)}
    assert named == {".ci/run", ".ci/versions.py", "launch/docs"} and all((ROOT / path).is_file() for path in named)
    assert "\nlaunch/docs\n" in (ROOT / ".ci/run").read_text() and "--strict" in (ROOT / "launch/docs").read_text()
    matrix = jobs["versions"]["strategy"]["matrix"]["include"]
    project = (ROOT / "pyproject.toml").read_text()
    assert {row["python"] for row in matrix} == set(re.findall(r"Python :: (3\.\d+)\"", project))
    lowest = re.search(r'dependencies = \["torch>=([\d.]+)"\]', project)
    assert lowest is not None
    assert min(matrix, key=lambda row: [*map(int, row["torch"].split("."))])["torch"].startswith(lowest[1])
    documented = (ROOT / "docs/versions.md").read_text()
    assert all(f"| {row['torch']} | {row['python']}" in documented for row in matrix)
    assert all(
        job["timeout-minutes"] <= 90 and job["steps"][0]["uses"].startswith("actions/checkout") for job in jobs.values()
    )
    assert workflow["permissions"] == {"contents": "read"}


def test_forms_citation_and_policy_are_complete():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.name for form in forms] == ["bug.yml", "idea.yml"]
    for form in (read(str(path.relative_to(ROOT))) for path in forms):
        assert form["name"] and form["description"]
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
        assert any(field.get("validations", {}).get("required") for field in form["body"])
    citation = read("CITATION.cff")
    assert citation["version"] == partial_fc.__version__ and citation["license"] == "Apache-2.0"
    linked = re.findall(r"\]\(([\w./]+)\)", (ROOT / "SECURITY.md").read_text())
    assert linked and all((ROOT / path).is_file() for path in linked)
