"""The picture of docs/a-step.md is the one that its program draws, and can be read at the width of a phone."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_what_the_program_draws():
    program = runpy.run_path(str(ROOT / "benchmarks/step_picture.py"))
    assert program["PICTURE"].read_text() == program["draw"](), "run python benchmarks/step_picture.py"


def test_the_picture_can_be_read_on_a_phone_and_on_any_background():
    picture = ElementTree.parse(ROOT / "docs/images/step.svg").getroot()
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    sizes = [int(size) for size in re.findall(r"font-size:(\d+)px", picture.findtext(f"{SVG}style") or "")]
    assert min(sizes) * 360 / width >= 12  # pixels, where a page leaves 360 for the picture
    paper = picture.find(f"{SVG}rect")
    assert paper is not None and (float(paper.attrib["width"]), float(paper.attrib["height"])) == (width, height)
    assert paper.attrib["fill"] == "#ffffff"
    said = [text.text or "" for text in picture.iter(f"{SVG}text")]
    page = (ROOT / "docs/a-step.md").read_text()
    titles = [re.sub(r"^\d\. ", "", title) for title in re.findall(r"^## (\d\. .*)$", page, re.MULTILINE)]
    assert len(titles) == 6 and [title for title in said if title in titles] == titles
