"""The documentation: links lead somewhere, the index names all pages, files that CONTRIBUTING.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import partial_fc

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_the_index_names_every_page():
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text())
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md")


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:partial_fc|tests|launch|docs|\.ci)/[\w./-]*)`", text)
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).exists(), name
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and folder.name not in ("core", "fuzzing", "gpu", "project", "support", "__pycache__"):
            assert (ROOT / "partial_fc" / folder.name).is_dir(), f"tests/{folder.name} mirrors no package"


def test_every_edge_names_tests_that_exist():
    """`tests/...py::name`; `...::name` and `::name` are of the file that was named last."""
    text = (ROOT / "docs/edges.md").read_text()
    named = re.findall(r"`((?:tests/[\w/]+\.py)?|\.\.\.)::(\w+)`", text)
    assert len(named) > 100
    file = ""
    for path, name in named:
        file = path if path.startswith("tests") else file
        assert re.search(rf"^def {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
    for section in text.split("\n## ")[1:]:
        assert "tests/" in section, section.splitlines()[0]


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == partial_fc.__version__ and versions == sorted(versions, reverse=True)
