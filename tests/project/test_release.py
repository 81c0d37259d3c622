"""What a package index would show and take: the description, the version everywhere, the order of the changelog."""

from __future__ import annotations

import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest
from readme_renderer import markdown

import partial_fc

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")
ORDER = ["Added", "Changed", "Renamed", "Removed", "Fixed", "Security"]


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.targets += [value for name, value in attrs if name in ("href", "src") and value]


def rendered(text: str) -> Page:
    html = markdown.render(text, variant="GFM")
    assert html is not None
    return Page(html)


def lost(page: Page) -> list[str]:
    """Links that lead to no heading and not out of the page."""
    return [
        target
        for target in page.targets
        if not target.startswith(("https://", "mailto:")) and not (target[0] == "#" and target[1:] in page.ids)
    ]


def test_the_description_has_no_link_that_leads_nowhere():
    described = SETUP["description"]()
    page = rendered(described)
    assert page.targets and lost(page) == []
    before = rendered(README)
    for tag in ("h1", "h2", "h3", "table", "tr", "pre", "li"):
        assert page.tags.count(tag) == before.tags.count(tag), tag
    for block in re.findall(r"^```.*?^```$", README, re.MULTILINE | re.DOTALL):
        assert block in described


@pytest.mark.parametrize(
    ("written", "shown", "with_source"),
    [
        ("see [a page](docs/a.md#b).", "see a page.", "see [a page](HOST/blob/v1.2/docs/a.md#b)."),
        ("[above](#top)", "[above](#top)", "[above](#top)"),
        ("[out](https://example.org/x)", "[out](https://example.org/x)", "[out](https://example.org/x)"),
        ("![a plot](docs/a.png)", "*Picture: a plot*", "![a plot](HOST/raw/v1.2/docs/a.png)"),
        ("[`x[0]`](a.py) and [b](c.md)", "`x[0]` and b", "[`x[0]`](HOST/blob/v1.2/a.py) and [b](HOST/blob/v1.2/c.md)"),
        ("```\n[kept](a.md)\n```\n[cut](a.md)", "```\n[kept](a.md)\n```\ncut", None),
    ],
)
def test_links_of_a_description(written, shown, with_source):
    assert SETUP["for_package_index"](written) == shown
    if with_source is not None:
        found = SETUP["for_package_index"](written, "https://example.org/us/it", "1.2")
        assert found == with_source.replace("HOST", "https://example.org/us/it")


def test_a_link_that_leads_nowhere_would_be_found():
    text = "# A b\n[a](docs/a.md) [b](#a-b) [c](#a-c) ![d](d.png) [e](https://example.org)"
    assert sorted(lost(rendered(text))) == ["#user-content-a-c", "d.png", "docs/a.md"]


def test_the_changelog_has_its_headings_in_order():
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        headings = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert headings == [each for each in ORDER if each in headings], version.splitlines()[0]


def test_the_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None and newest is not None
    assert partial_fc.__version__ == citation[1] == newest[1]
