"""The documentation as a site: it is built without a warning, every link in it leads somewhere, nothing is loaded from
elsewhere, and it can be read and searched in a browser, from the disk and on a phone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytestmark = pytest.mark.timeout(700)  # the build, eight seconds of a processor, on machines with other work

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def load_hooks() -> Any:
    specification = importlib.util.spec_from_file_location("site_hooks", DOCS / "site/hooks.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


hooks = load_hooks()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*build, "--site-dir", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return out


class Parts(HTMLParser):
    """Anchors of a page, what it links, what it loads, and its text but for code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.code += tag in CODE
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.loaded += [value for name in ("src", "href", "srcset") if (value := given.get(name))]

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in CODE

    def handle_data(self, text: str) -> None:
        self.text += "" if self.code else f"{text}\n"


CODE = ("code", "pre", "script", "style")


def test_every_link_of_the_site_leads_somewhere_and_nothing_comes_from_elsewhere(site):
    pages = {path: Parts(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    assert len(pages) > 60
    outside, checked = defaultdict(list), 0
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            address, anchor = urldefrag(link)
            if re.match(r"https?:", link) and link in page.links:
                continue
            if re.match(r"\w+:|//", link):
                outside[link].append(path.name)
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            assert target.is_file(), f"{path.relative_to(site)} links {link}"
            if anchor and target in pages and not anchor.startswith("__"):  # the theme's own begin with __
                assert unquote(anchor) in pages[target].anchors, f"{path.relative_to(site)} links {link}"
            checked += 1
    assert not outside and checked > 3000
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_no_list_table_or_emphasis_is_left_as_it_was_written(site):
    """MkDocs wants more blank lines and deeper indents than the host does."""
    assert re.search(LEFT, "a\n- b") and re.search(LEFT, "| a | b |") and re.search(LEFT, "**a**")
    for path in sorted(site.rglob("*.html")):
        found = re.search(LEFT, Parts(path.read_text()).text)
        assert not found, f"{path.relative_to(site)}: {found}"


LEFT = re.compile(r"^[ ]*- \w.*$|^[ ]*\|.*$|\*\*.*|^.*\]\(.*$|^:::.*$", re.MULTILINE)


def test_the_reference_shows_docstrings_and_arguments(site):
    heads = (site / "api/heads.html").read_text()
    for name in ("PartialFC", "PartialFC.forward", "PartialFC.expand", "CenterLoss.step", "gather"):
        assert f'id="partial_fc.{name}"' in heads
    assert "share of classes drawn for a step" in heads
    assert "../tiers.html" in heads  # `docs/tiers.md` in a docstring
    settings = (site / "api/settings.html").read_text()
    assert all(text in settings for text in ("accumulation", "Largest norm of the gradient of backbone and head"))


def test_the_navigation_has_the_readers_tasks(site):
    tabs = hooks.navigation((DOCS / "index.md").read_text())
    assert [next(iter(tab)) for tab in tabs] == ["Start", "How to", "Reference", "Understand", "Project"]
    home = (site / "index.html").read_text()
    for name in ("quickstart.html", "own-loop.html", "api/heads.html", "design.html", "repository/CHANGELOG.html"):
        assert f'href="{name}"' in home.replace("./", ""), name


def test_sections_are_tabs_and_groups_and_files_outside_are_copies():
    index = """# Title
## Words without a table
text
## Start
| page | what |
|---|---|
| [a.md](a.md) | A |
### More
| notebooks: [b](notebooks/b.ipynb), [e](../e.ipynb) | B, [not this](c.md) |
| [C](../CHANGELOG.md) | C |
"""
    assert hooks.navigation(index) == [
        {"Start": ["a.md", {"More": ["notebooks/b.md", "repository/e.md", "repository/CHANGELOG.md"]}]},
    ]
    text = "[losses.md](losses.md#x) `[a](../README.md)` [t](../tests/conftest.py) [w](https://a.org)\n```\n[k](../LICENSE)\n```\n"
    assert hooks.rewritten(text, hooks.source_of("gpu.md"), "gpu.md") == text.replace(
        "[losses.md](", "[Choosing a loss]("
    ).replace("../tests/conftest.py", "repository/tests/conftest.py.md")
    assert (
        hooks.rewritten("[a](docs/gpu.md)", hooks.source_of("repository/README.md"), "repository/README.md")
        == "[a](../gpu.md)"
    )


def test_a_notebook_becomes_a_page_with_what_it_printed_and_drew():
    printed = {"output_type": "stream", "text": ["1\n", "2\n"]}
    drawn = {"output_type": "display_data", "data": {"image/png": "aGVsbG8=", "text/plain": ["<Figure>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Words."]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [printed, drawn]},
        {"cell_type": "code", "source": [], "outputs": []},
        {"cell_type": "code", "source": ["%%bash -e\n", "ls"], "outputs": []},
        {"cell_type": "code", "source": ["%%writefile run.yaml\n", "a: 1"], "outputs": []},
    ]
    made = dict(hooks.notebook_files("notebooks/one.md", json.dumps({"cells": cells})))
    assert made["notebooks/one-1.png"] == b"hello"
    assert made["notebooks/one.md"] == (
        "# Title\nWords.\n\n```python\nprint(1)\n```\n\n```text\n1\n2\n```\n\n![what the cell above draws](one-1.png)\n\n"
        "```bash\nls\n```\n\n```yaml\n%%writefile run.yaml\na: 1\n```\n"
    )


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize("name", ["index", "losses", "edges", "quickstart", "api/heads", "api/settings"])
def test_a_page_fits_a_phone(site, browser, name):
    """Wide tables and code scroll by themselves."""
    seen = browser.open(site / f"{name}.html", 390, evaluate="document.documentElement.scrollWidth")
    assert seen.evaluated <= 390 and not seen.complaints
    assert all(request.startswith(site.as_uri()) for request in seen.requests)


def test_the_search_finds_a_page_without_a_server(site, browser):
    with browser.page((site / "index.html").as_uri(), 1280) as page:
        page.type(".md-search__input", "skipped_rows")
        found = page.wait(
            "[...document.querySelectorAll('.md-search-result__link')].map((each) => each.href).join(' ')"
        )
        assert "optimizers.html" in found or "api/" in found
        seen = page.seen()
    assert not seen.complaints and all(request.startswith(site.as_uri()) for request in seen.requests)
