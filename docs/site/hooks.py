"""Hooks of MkDocs, for pages that are written to be read on the project's host as well.

What becomes of what:

    docs/index.md              its sections and tables of pages are the navigation: sections `##` are tabs, `###` groups
    links out of docs/         lead to a copy in the site: Markdown as a page, other files with their lines numbered
    notebooks (*.ipynb)        become pages: text, code, and what was printed and drawn when they were run last
    docs/NAME.md in docstrings becomes a link
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger(__name__)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COPIES = "repository"
"""Where copies of files outside docs/ are in the site."""

LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yml": "yaml", ".toml": "toml", ".json": "json"}
LANGUAGES |= {".yaml": "yaml"}
PICTURES = (".png", ".svg", ".jpg")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [{"Home": "index.md"}, *navigation((DOCS / "index.md").read_text())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    notebooks = [PurePosixPath(path.relative_to(ROOT).as_posix()) for path in sorted(DOCS.rglob("*.ipynb"))]
    for path in [*notebooks, *linked_files()]:
        for name, content in page_of(path):
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    return rewritten(markdown, source_of(name), name)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the pages that docstrings name."""

    def link(found: re.Match[str]) -> str:
        file = files.get_file_from_path(found[1])
        if file is None:
            log.warning(f"a docstring in {page.file.src_uri} names {found[0]}, which does not exist")
            return found[0]
        return f'<a href="{file.url_relative_to(page.file)}">{title_of(PurePosixPath(found[0]))}</a>'

    return re.sub(r"\bdocs/([\w-]+\.md)\b", link, html) if page.file.src_uri.startswith("api/") else html


# ------------------------------------------------------------------------------------------------------- navigation


def navigation(index: str) -> list[dict[str, Any]]:
    """The navigation that docs/index.md describes, {"Start": ["install.md", {"Come from ...": [...]}]}: links in the
    first column of its tables. Titles are those of the pages."""
    tabs: list[dict[str, Any]] = []
    rows: list[Any] = []
    for line in index.splitlines():
        if heading := re.match(r"(##+) (.*)", line):
            rows = []
            if heading[1] == "##":
                tabs.append({heading[2]: rows})
            else:
                tabs[-1][next(iter(tabs[-1]))].append({heading[2]: rows})
        elif row := re.match(r"\|([^|]*)\|", line):
            rows += [site_name(link) for link in re.findall(r"\]\(([^)#]+)\)", row[1])]
    return [tab for tab in tabs if any(tab.values())]


def site_name(link: str) -> str:
    """The name in the site of a page that docs/index.md links."""
    return name_of(PurePosixPath(os.path.normpath(f"docs/{link}")))


# ------------------------------------------------------------------------------------------------------------ links


def inside(path: PurePosixPath) -> bool:
    return path.parts[0] == "docs"


def name_of(path: PurePosixPath) -> str:
    """The name in the site of a file of the repository; what is no picture is a page."""
    if path.suffix == ".ipynb":
        path = path.with_suffix(".md")
    if inside(path):
        return path.relative_to("docs").as_posix()
    return f"{COPIES}/{path}" if path.suffix in (".md", *PICTURES) else f"{COPIES}/{path}.md"


def source_of(name: str) -> PurePosixPath | None:
    """The file of the repository that a page of the site was made from, where that has links; else None."""
    path = PurePosixPath(name).relative_to(COPIES) if name.startswith(f"{COPIES}/") else PurePosixPath("docs") / name
    return next((each for each in (path, path.with_suffix(".ipynb")) if (ROOT / each).is_file()), None)


def links(markdown: str) -> Iterator[re.Match[str]]:
    """Targets of links and pictures outside blocks of code."""
    code = [found.span() for found in re.finditer(r"^( *)(```+|~~~+).*?^\1\2 *$|`[^`\n]+`", markdown, re.M | re.S)]
    for found in re.finditer(r"(?<=\]\()([^)\s#]+)(?=(?:#[^)\s]*)?\))", markdown):
        if not any(start <= found.start() < end for start, end in code) and "://" not in found[1]:
            yield found


def target_of(link: str, source: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(os.path.normpath(source.parent / link))


def linked_files() -> list[PurePosixPath]:
    """Files outside docs/ that its pages link, and that those link in turn."""
    pages = sorted(path for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb"))
    waiting = [PurePosixPath(path.relative_to(ROOT).as_posix()) for path in pages]
    found: list[PurePosixPath] = []
    while waiting:
        source = waiting.pop()
        for link in links(markdown_of(source)):
            path = target_of(link[1], source)
            if not inside(path) and path not in found and (ROOT / path).is_file():
                found.append(path)
                waiting.append(path)
    return sorted(found)


def rewritten(markdown: str, source: PurePosixPath | None, name: str) -> str:
    """The Markdown of `source` with its links as they must be in the page `name` of the site."""
    if source is None:
        return markdown
    here, parts, end = PurePosixPath(name).parent, [], 0
    for link in links(markdown):
        path = target_of(link[1], source)
        if path.parts[0] == ".." or not (ROOT / path).exists():
            continue  # MkDocs reports it
        text = markdown[end : link.start()]
        if text.endswith(f"[{path.name}]("):  # on the site a page goes by its title
            text = text.removesuffix(f"{path.name}](") + f"{title_of(path)}]("
        parts += [text, os.path.relpath(name_of(path), here)]
        end = link.end()
    return "".join([*parts, markdown[end:]])


def title_of(path: PurePosixPath) -> str:
    heading = re.search(r"^# (.*)$", markdown_of(path), re.M)
    return heading[1] if heading else path.name


# ------------------------------------------------------------------------------------------------------------ pages


def markdown_of(path: PurePosixPath) -> str:
    """The text of a page, or of a notebook without its code; empty for other files."""
    if path.suffix == ".ipynb":
        cells = json.loads((ROOT / path).read_text())["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return (ROOT / path).read_text() if path.suffix == ".md" else ""


def page_of(path: PurePosixPath) -> Iterator[tuple[str, str | bytes]]:
    """The page of a file and the pictures that it shows, by their names in the site."""
    name = name_of(path)
    if path.suffix in PICTURES:
        yield name, (ROOT / path).read_bytes()
    elif path.suffix == ".ipynb":
        yield from notebook_files(name, (ROOT / path).read_text())
    else:
        yield name, (ROOT / path).read_text() if path.suffix == ".md" else code_page(path)


def code_page(path: PurePosixPath) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    return f"{head}~~~~~~~~ {{ .{language} linenums=1 }}\n{(ROOT / path).read_text()}\n~~~~~~~~\n"


def notebook_files(name: str, text: str) -> Iterator[tuple[str, str | bytes]]:
    """The page `name` of a notebook and the pictures that it shows, by their names in the site."""
    stem, parts, pictures = name.removesuffix(".md"), [], 0
    for cell in json.loads(text)["cells"]:
        body = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(body)
        elif cell["cell_type"] == "code" and body.strip():
            magic = re.match(r"%%(?:bash\b.*|writefile .*?(\.\w+))\n", body)  # of IPython: a cell that is no Python
            language = "python" if magic is None else LANGUAGES.get(magic[1] or ".sh", "text")
            parts.append(f"```{language}\n{body.removeprefix(magic[0] if magic and not magic[1] else '')}\n```")
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    pictures += 1
                    picture = f"{stem}-{pictures}.png"
                    yield picture, base64.b64decode("".join(data["image/png"]))
                    parts.append(f"![what the cell above draws]({PurePosixPath(picture).name})")
                elif printed := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                    parts.append(f"```text\n{printed}\n```")
    yield name, "\n\n".join(parts) + "\n"
