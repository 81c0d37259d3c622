"""The documentation: links lead somewhere, the index names all pages, the reference all public names, and files that
CONTRIBUTING.md names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import partial_fc

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            assert re.fullmatch(r"https://([a-z\d-]+\.)+[a-z]{2,}(/[\w./%~@:+-]*)?(\?[\w=&.-]+)?(#[\w.-]+)?", link), (
                link
            )
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_the_index_names_every_page():
    """In the first column of a table: these links are the navigation of the site (docs/site/hooks.py)."""
    cells = re.findall(r"^\|([^|]*)\|", (DOCS / "index.md").read_text(), re.MULTILINE)
    listed = [link for cell in cells for link in re.findall(r"\]\(([\w/-]+\.(?:md|ipynb))\)", cell)]
    pages = [path for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind) if path != DOCS / "index.md"]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in pages)


def test_the_reference_has_every_public_name():
    """Those that packages export, and those that the pages and examples import."""
    entries = re.findall(r"^::: ([\w.]+)", "\n".join(page.read_text() for page in DOCS.glob("api/*.md")), re.MULTILINE)
    assert len(entries) == len(set(entries))
    exported = {
        f"{package}.{name}"
        for package in ("partial_fc", *(f"partial_fc.training.{part}" for part in PUBLIC))
        for name in importlib.import_module(package).__all__
    }
    used = {
        f"{module}.{name}"
        for path in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]
        for module, block, line in re.findall(IMPORT, path.read_text(), re.MULTILINE)
        for name in re.findall(r"\w+", block or line)
    }
    assert len(exported) > 80 and len(used) > 50
    missing = {name for name in exported | used if not any(is_entry_of(entry, name) for entry in entries)}
    assert not missing, f"without an entry in docs/api/: {sorted(missing)}"


def is_entry_of(entry: str, name: str) -> bool:
    """Whether they are the same, or `name` is imported from a module of the package that exports it."""
    package, _, last = entry.rpartition(".")
    return entry == name or (name.startswith(f"{package}.") and name.endswith(f".{last}"))


PUBLIC = ("data", "export", "gallery", "protocols")
IMPORT = r"^from (partial_fc[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))"


def test_the_page_names_what_may_change_when_a_run_resumes():
    from partial_fc.training.config import FREE_ON_RESUME

    page = (DOCS / "checkpoints.md").read_text()
    section = page[page.index("## What may change when a run resumes") :].split("\n\n")[2]
    assert re.findall(r"`([\w.*]+)`", section) == [f"{each}*" if each[-1] == "." else each for each in FREE_ON_RESUME]


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
