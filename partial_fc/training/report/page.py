"""HTML pages: the templates of this folder, and images embedded as data URIs."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Return the page of a template of this folder. Text is escaped; a value that is missing raises an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    return page.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8, a page must


def png_uri(png: bytes) -> str:
    """Return the data URI of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
