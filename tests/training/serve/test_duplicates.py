"""The pairs of an audit are read from its table, with pictures of the training set; a damaged table is one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import ask, make_gallery, recogniser, serving

from partial_fc.training.cli.main import train_parser
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.errors import UserError
from partial_fc.training.serve.app import make_app
from partial_fc.training.serve.duplicates import PICTURES, Duplicates

HEADING = "row_cosine,mean_cosine,class_a,identity_a,images_a,class_b,identity_b,images_b"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return to_config(train_parser(), ["--data.identities", "5"])


@pytest.fixture
def names() -> list[str]:
    return GlyphIdentities("train", 5).identity_names


def audit(folder: Path, *lines: str, heading: str = HEADING) -> Path:
    (folder / "duplicates.csv").write_text("\n".join((heading, *lines)) + "\n", encoding="utf-8")
    return folder


def test_pairs_and_pictures(tmp_path, config, names):
    folder = audit(tmp_path, f"0.5,,0,{names[0]},10,3,{names[3]},10", f",0.25,1,{names[1]},10,9,gone,2")
    found = Duplicates(folder, config)
    first, second = found.pairs
    assert (first.a.name, first.b.number, first.row_cosine, first.mean_cosine) == (names[0], 3, 0.5, None)
    assert (second.row_cosine, second.mean_cosine, second.b.images) == (None, 0.25, 2)
    pixels = GlyphIdentities("train", 5).load(31)[0].numpy()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.picture(3, 1) or b""))), pixels)
    assert found.picture(2, 0) is None, "a class of no pair is not shown"
    assert found.picture(9, 0) is None, "a class that the data do not have"
    assert found.picture(0, PICTURES) is None
    with serving(make_app(recogniser(make_gallery(tmp_path / "people", count=1)), found)) as address:
        shown = ask(address, "GET", "/api/duplicates?offset=1&limit=1").json
        assert (shown["total"], [each["a"]["identity"] for each in shown["pairs"]]) == (2, [names[1]])
        assert ask(address, "GET", shown["pairs"][0]["a"]["pictures"][0]).headers["content-type"] == "image/png"
        assert ask(address, "GET", shown["pairs"][0]["b"]["pictures"][0]).status == 404


def test_data_that_are_gone_or_others_leave_the_pairs_without_pictures(tmp_path, config, names):
    folder = audit(tmp_path, "0.5,0.5,0,another name,10,1,x,10")
    assert Duplicates(folder, config).picture(0, 0) is None, "the class has another name now"
    gone = to_config(train_parser(), ["--data.folder", str(tmp_path / "gone")])
    found = Duplicates(folder, gone)
    assert found.picture(0, 0) is None and len(found.pairs) == 1


@pytest.mark.parametrize(
    ("lines", "heading"),
    [
        (["0.5,0.5,0,a,10,1,b"], HEADING),
        (["0.5,0.5,zero,a,10,1,b,1"], HEADING),
        (["much,0.5,0,a,10,1,b,1"], HEADING),
        (['0.5,0.5,0,"a,10,1,b,1'], HEADING),
        (["1,2"], "a,b"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, config, lines, heading):
    with pytest.raises(UserError, match=r"duplicates\.csv is damaged .*; write it again with `partial-fc audit RUN`"):
        Duplicates(audit(tmp_path, *lines, heading=heading), config)


def test_a_missing_table_is_named(tmp_path, config):
    with pytest.raises(UserError, match=r"duplicates\.csv is missing; write it with `partial-fc audit RUN`"):
        Duplicates(tmp_path, config)
