"""Check the files in an sdist and in the wheel that was built from it: `python .ci/check_archives.py SDIST WHEEL`.

The wheel must hold every file of partial_fc/; the sdist also the license, the documentation and the tests. The
description must be one that a package index can show.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from readme_renderer import markdown

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "configs", "docker", "docs", "examples", "launch", "partial_fc", "tests")
FILES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "constraints-hashes.txt",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    ".dockerignore",
)
LICENSES = ("LICENSE", "partial_fc/training/assets/ATTRIBUTION.md")
FIELDS = {"Author", "Classifier", "Keywords", "License-Expression", "Requires-Python", "Summary"}


def tree(*folders: str) -> set[str]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def check(archive: Path, found: set[str], wanted: set[str]) -> None:
    """Exit with the names that are missing from `archive`."""
    if missing := sorted(wanted - found):
        sys.exit(f"{archive.name} lacks {', '.join(missing)}")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        check(path, {name.partition("/")[2] for name in archive.getnames()}, tree(*FOLDERS) | set(FILES))


def check_wheel(path: Path) -> None:
    package = tree("partial_fc")
    info = "-".join(path.name.split("-")[:2]) + ".dist-info"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    check(path, names, package | {f"{info}/licenses/{license}" for license in LICENSES})
    if extra := sorted(name for name in names - package if not name.startswith(f"{info}/")):
        sys.exit(f"{path.name} must not hold {', '.join(extra)}")
    check(path, set(metadata), FIELDS)
    check_description(path, metadata.get_payload(), metadata["Description-Content-Type"])


def check_description(archive: Path, description: str, kind: str) -> None:
    """Exit unless a package index can show it, with links that lead out of it."""
    html = markdown.render(description, variant="GFM") if kind == "text/markdown" else None
    if not html:
        sys.exit(f"the description of {archive.name} cannot be shown as {kind}")
    known = {f"#{name}" for name in re.findall(r'\bid="([^"]*)"', html)}
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    if lost := [link for link in links if not link.startswith("https://") and link not in known]:
        sys.exit(f"the description of {archive.name} has links that lead nowhere: {', '.join(lost)}")


if __name__ == "__main__":
    check_sdist(Path(sys.argv[1]))
    check_wheel(Path(sys.argv[2]))
    print(f"{Path(sys.argv[1]).name} and {Path(sys.argv[2]).name} are complete")
