"""What pyproject.toml cannot say: the description that a package index shows, README.md without what leads nowhere.

A package index knows no files of the project. So when a package is built, links to them become their text, and pictures
their description. Links to headings stay: the index's renderer (readme_renderer) names both. With an address under
[project.urls] as `Source`, links and pictures lead there, to the files of this version.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def for_package_index(text: str, source: str | None = None, version: str = "") -> str:
    """Markdown whose links and pictures all lead to headings, or begin with https:// or mailto:. Code blocks stay.

    source: address of the project at its host, without a slash at the end. version: the tag is v{version}.
    """

    def rewritten(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if target.startswith(("https://", "mailto:", "#")):
            return match[0]
        if source is not None:
            return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/v{version}/{target})"
        return f"*Picture: {words}*" if picture else words

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # every second is a code block
    return "".join(part if place % 2 else LINK.sub(rewritten, part) for place, part in enumerate(parts))


def description() -> str:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = re.search(r'^Source = "([^"]+?)/?"$', project, re.MULTILINE)
    version = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "partial_fc/__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return for_package_index(readme, None if source is None else source[1], version[1])


if __name__ == "__main__":  # as builds run it; tests take the function alone
    from setuptools import setup

    setup(long_description=description(), long_description_content_type="text/markdown")
