"""Fonts made here, with every trap in them, become a data set in which a design counts once and nothing held out is
trained on."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import args
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from partial_fc.training.cli.glyphs import verify
from partial_fc.training.cli.main import main
from partial_fc.training.data import DataConfig, open_data
from partial_fc.training.data.fonts import draw_face as drawing
from partial_fc.training.data.fonts.draw_face import draw_face
from partial_fc.training.data.fonts.draw_set import build
from partial_fc.training.data.fonts.font_files import SCRIPTS, Face, font_files, parse_ranges
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.data.formats.packed import PackedIdentities
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.errors import UserError

FIRST = 0xAC00
CHARACTERS = 40  # of each font here
BLANK, BOX, REPEATED = FIRST + 40, FIRST + 41, tuple(range(FIRST + 42, FIRST + 48))  # what font A only pretends to have
Rectangle = tuple[int, int, int, int]
NOTDEF: list[Rectangle] = [(100, 0, 900, 800)]


def outline(rectangles: list[Rectangle]) -> Any:
    pen = TTGlyphPen(None)
    for x0, y0, x1, y1 in rectangles:
        pen.moveTo((x0, y0))
        for point in ((x0, y1), (x1, y1), (x1, y0)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


def shapes(seed: int, characters: int = CHARACTERS) -> dict[int, list[Rectangle]]:
    """Six random bars a character."""
    rng = np.random.default_rng(seed)
    found: dict[int, list[Rectangle]] = {}
    for code in range(FIRST, FIRST + characters):
        corners = rng.integers(0, 800, (6, 2))
        sides = rng.integers(60, 200, (6, 2))
        found[code] = [(int(x), int(y), int(x + w), int(y + h)) for (x, y), (w, h) in zip(corners, sides, strict=True)]
    return found


def write_font(
    path: Path, family: str, drawn: dict[int, list[Rectangle]], style: str = "Regular", weight: int = 400
) -> Path:
    names = {code: f"u{code:X}" for code in drawn}
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names.values()])
    font.setupCharacterMap(names)
    font.setupGlyf({".notdef": outline(NOTDEF)} | {names[code]: outline(each) for code, each in drawn.items()})
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": style})
    font.setupOS2(usWeightClass=weight)
    font.setupPost()
    font.save(str(path))
    return path


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Designs Aa, Bb, ..., Gg; a copy of Aa moved by less than a pixel, a bold Aa; a file that is no font, and one cut
    in the middle."""
    folder = tmp_path_factory.mktemp("fonts")
    (folder / "deep").mkdir()
    traps: dict[int, list[Rectangle]] = {BLANK: [], BOX: NOTDEF} | {code: [(0, 0, 800, 100)] for code in REPEATED}
    first = shapes(0)
    write_font(folder / "a.ttf", "Aa", first | traps)
    write_font(
        folder / "a-bold.ttf",
        "Aa",
        {code: [(x, y, x + 400, y + 400) for x, y, _, _ in each] for code, each in first.items()},
        "Bold",
        700,
    )
    copied = {code: [(x0 + 8, y0, x1 + 8, y1) for x0, y0, x1, y1 in each] for code, each in list(first.items())[:-3]}
    write_font(folder / "deep" / "copy.ttf", "Copy of Aa", copied)
    for seed, family in enumerate(("Bb", "Cc", "Dd", "Ee", "Ff", "Gg"), 1):
        write_font(folder / f"{family}.ttf", family, shapes(seed, CHARACTERS - 2 * (family == "Bb")))
    (folder / "noise.ttf").write_bytes(bytes(range(256)) * 20)
    whole = (folder / "Bb.ttf").read_bytes()
    (folder / "cut.otf").write_bytes(whole[:300])
    shutil.copy(folder / "a.ttf", folder / "deep" / "noise.txt")
    return folder


def settings(folder: Path, out: Path, **changes: Any) -> GlyphSettings:
    return GlyphSettings(
        **{"fonts": [str(folder)], "out": str(out), "holdout_identities": 8, "holdout_designs": ["Ff", "gg"], **changes}
    )


class Silent:
    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.update, self.close = stop, lambda: None


def make(folder: Path, out: Path, **changes: Any) -> list[str]:
    said: list[str] = []
    build(settings(folder, out, **changes), said.append, lambda what, total: Silent())
    return said


@pytest.fixture(scope="module")
def made(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "set"
    make(fonts, out)
    return out


def test_the_command_tells_what_it_drops_and_counts_what_it_wrote(fonts, tmp_path, capsys, mistake):
    out = tmp_path / "set"
    arguments = [
        "data",
        "glyphs",
        "--fonts",
        str(fonts),
        "--out",
        str(out),
        *args("--holdout_identities 8 --holdout_designs Ff gg"),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in (
        "noise.ttf: ",
        "cut.otf: ",
        "skipped: 1 other weights and styles",
        "8 families are 7 designs",
        "Aa   (the same: Copy of Aa)",
        "1 glyphs: blank or nearly so",
        "1 glyphs: the image of the missing glyph (.notdef)",
        "6 glyphs: an image that more than 4 characters of the font share",
        "40 identities, 214 images of 32 x 32",  # 32 characters in 5 designs, 8 in 7, 2 of Bb's missing
        "hangul: 40",
        f"--data.folder {out}",
    ):
        assert part in text, part
    assert not (out / ".work").exists()
    assert main(arguments) == 0
    assert "is complete already" in capsys.readouterr().out
    assert "begun with other settings or fonts (size)" in mistake(*arguments, "--size", "16")


def test_nothing_held_out_is_trained_on(made):
    splits = open_data(DataConfig(folder=str(made)), seed=0)
    seen, new = splits.evaluation["seen"], splits.evaluation["new"]
    splits.check_evaluation()
    assert (splits.train.num_identities, seen.num_identities, new.num_identities) == (32, 8, 8)
    assert seen.identity_names == new.identity_names
    assert not set(seen.identity_names) & set(splits.train.identity_names)
    assert {data.name_of(i).split(" in ")[1] for data in (splits.train, seen) for i in range(len(data))} == {
        "Aa",
        "Bb",
        "Cc",
        "Dd",
        "Ee",
    }
    assert [new.name_of(i).split(" in ")[1] for i in range(len(new))] == ["Ff", "Gg"] * 8
    assert splits.train.labels.tolist() == sorted(splits.train.labels.tolist())
    some = open_data(DataConfig(folder=str(made), identities=5), seed=1).train
    assert some.identity_names == splits.train.identity_names[:5]
    assert set(some.labels.tolist()) == set(range(5))


def test_characters_of_few_designs_can_be_left_out(made):
    whole = open_data(DataConfig(folder=str(made)), seed=0).train
    counts = torch.bincount(whole.labels)
    most = int(counts.max())
    kept = (counts == most).nonzero().flatten().tolist()
    assert 2 < len(kept) < len(counts)
    filtered = open_data(DataConfig(folder=str(made), min_images=most, identities=len(kept) - 1), seed=0)
    data = filtered.train
    assert data.identity_names == [whole.identity_names[each] for each in kept[:-1]]
    assert torch.bincount(data.labels).tolist() == [most] * (len(kept) - 1)
    where = {whole.name_of(index): index for index in range(len(whole))}
    assert all(torch.equal(data.load(index), whole.load(where[data.name_of(index)])) for index in range(len(data)))
    assert filtered.label_map is not None and (filtered.label_map.labels >= 0).nonzero().flatten().tolist() == kept[:-1]
    with pytest.raises(
        UserError, match=rf"{len(kept) + 1} identities were asked for, but there are {len(kept)} in the packed data set"
    ):
        open_data(DataConfig(folder=str(made), min_images=most, identities=len(kept) + 1), seed=0)


def test_a_picture_is_the_outline_of_its_character(made, fonts):
    """Ink against the area of the font's own bars, rasterised here at a tenth of a pixel."""
    data = PackedIdentities(made, "train")
    drawn = shapes(2)  # of Cc
    scale = 0.9 * 32 / 1000
    checked = 0
    for index in range(len(data)):
        name, _, design = data.name_of(index).partition(" in ")
        if design != "Cc":
            continue
        bars = drawn[int(name[2:], 16)]
        left, bottom = min(b[0] for b in bars), min(b[1] for b in bars)
        width, height = max(b[2] for b in bars) - left, max(b[3] for b in bars) - bottom
        fine = np.zeros((height, width), bool)
        for x0, y0, x1, y1 in bars:
            fine[y0 - bottom : y1 - bottom, x0 - left : x1 - left] = True
        image = data.load(index)[0].double() / 255
        assert float(image.sum()) == pytest.approx(fine.sum() * scale**2, rel=0.03)
        rows, columns = image.sum(1).nonzero().flatten(), image.sum(0).nonzero().flatten()
        assert abs(int(rows[0] + rows[-1]) - 31) <= 1  # in the middle
        assert abs(int(columns[0] + columns[-1]) - 31) <= 1
        assert int(columns[-1] - columns[0]) == pytest.approx(width * scale, abs=1.5)
        centre = (
            float((image.sum(1) * np.arange(32)).sum() / image.sum()) + 0.5 - (32 - height * scale) / 2
        )  # from the top
        assert centre == pytest.approx(
            (height - np.nonzero(fine)[0].mean()) * scale, abs=1.1
        )  # upright, to a pixel of rounding
        checked += 1
    assert checked == 32


def test_a_picture_is_one_character_in_a_family_of_several_faces(tmp_path):
    """A face that adds characters to another's design has its own idea of which of two alike is the first."""
    bars = shapes(5)
    first, alike = FIRST, FIRST + 1
    bars[alike] = bars[first]
    folder = tmp_path / "fonts"
    folder.mkdir()
    write_font(folder / "one.ttf", "Aa", bars)
    write_font(folder / "two.ttf", "Aa Copy", {code: bars[code] for code in bars if code != FIRST + 2})
    for seed, family in ((6, "Bb"), (7, "Cc")):
        write_font(folder / f"{family}.ttf", family, shapes(seed))
    make(folder, tmp_path / "set", min_designs=2, holdout_identities=0, holdout_designs=[])
    data = PackedIdentities(tmp_path / "set", "train")
    drawn = [(data.name_of(index).split(" in ")[1], data.load(index).numpy().tobytes()) for index in range(len(data))]
    assert len(drawn) == len(set(drawn)) == 3 * CHARACTERS - 1


def test_drawings_beyond_their_em_are_made_to_fit(tmp_path):
    large = {code: [(-700, -700, 1400, 1400), (-900, 0, 1700, 90)] for code in range(FIRST, FIRST + 4)}
    path = write_font(tmp_path / "large.ttf", "Large", large)
    drawn = draw_face(Face(str(path), 0, "Large", "Regular", 400, 4), None, SCRIPTS["hangul"], 32)
    assert len(drawn.codes) == 1
    assert 30 <= drawn.images[0].any(0).sum() <= 32
    assert 24 <= drawn.images[0].any(1).sum() <= 28  # 2,100 high, 2,600 wide
    assert drawn.dropped == {"the image of another character of the font": 3}


def test_a_stopped_build_goes_on_and_ends_alike(fonts, made, tmp_path, monkeypatch):
    out, ticks = tmp_path / "set", iter(range(100))
    files = ("images.npy", "labels.npy", "sources.npy", "packed.json")

    def stop() -> None:
        if next(ticks) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(
            settings(fonts, out),
            lambda line: None,
            lambda what, total: Silent(stop if what == "drawing" else lambda: None),
        )
    with pytest.raises(UserError, match="begun with other settings or fonts \\(min_designs\\)"):
        make(fonts, out, min_designs=2)
    fonts_drawn: list[str] = []
    original = drawing.draw_face

    def counted(face: Face, codes: Any, *more: Any) -> Any:
        fonts_drawn.append(face.family)
        return original(face, codes, *more)

    monkeypatch.setattr(drawing, "draw_face", counted)
    make(fonts, out)
    assert len(fonts_drawn) == 8 + 3  # all to be compared; the four that were drawn before are not drawn again
    for name in files:
        assert (out / name).read_bytes() == (made / name).read_bytes(), name


def test_batches_come_from_worker_processes(made):
    data = pickle.loads(pickle.dumps(PackedIdentities(made, "seen")))
    here, there = (list(BatchLoader(data, batch_size=10, workers=workers)) for workers in (0, 1))
    assert [batch.indices.tolist() for batch in here] == [batch.indices.tolist() for batch in there]
    assert all((a.images == b.images).all() for a, b in zip(here, there, strict=True))


def test_a_run_trains_on_it(made, tmp_path):
    out = tmp_path / "run"
    run = ["train", "--data.folder", str(made), *args("--train.batch_size 32 --train.epochs 1 --train.cpu true")]
    assert main([*run, "--output.folder", str(out)]) == 0
    found = {each["name"]: each for each in json.loads((out / "metrics.json").read_text())["evaluations"]}
    assert {name: each["identities"] for name, each in found.items()} == {"seen": 8, "new": 8}
    assert main(["evaluate", str(out), "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())["evaluations"]
    assert [each["identities"] for each in again] == [8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fonts": ["/nowhere"]}, "/nowhere is not a folder"),
        ({"scripts": "klingon"}, "klingon.*give han, hangul"),
        ({"scripts": "AC10-AC00"}, "not a range of code points"),
        ({"size": 4}, "--size is 4; give at least 8"),
        ({"min_designs": 9}, "no character has 9 designs"),
        ({"holdout_identities": 0}, "--holdout_designs has no effect without --holdout_identities"),
        ({"holdout_identities": 39}, "1 characters are left to train on"),
        ({"holdout_identities": 41}, "--holdout_identities is 41, but 40 characters"),
        ({"holdout_designs": ["Zz"]}, "no family begins with 'Zz'; the designs are Aa, Bb"),
        ({"holdout_designs": ["7"]}, "hold out all 7 designs"),
        ({"on_error": "raise"}, "the font .*cut.otf cannot be used: .*--on_error skip"),
    ],
)
def test_what_makes_no_data_set_is_said(fonts, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(fonts, tmp_path / "set", **changes)


def test_a_folder_in_use_is_left_alone(fonts, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use; choose another --out"):
        make(fonts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no font file"):
        font_files([tmp_path / "empty"])


def hold_out(folder: Path, places: Any) -> None:
    index = json.loads((folder / "packed.json").read_text())
    index["held_out"]["identities"] = list(range(len(index["identities"]))) if places == "all" else places
    (folder / "packed.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "packed.json").write_text("{"), r"packed\.json cannot be read"),
        (lambda folder: (folder / "packed.json").write_text("{}"), r"packed\.json cannot be read \(KeyError"),
        (lambda folder: (folder / "packed.json").write_text('{"format": "9"}'), "has the format '9'"),
        (
            lambda folder: (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:5000]),
            r"images\.npy cannot be read",
        ),
        (lambda folder: (folder / "sources.npy").unlink(), r"sources\.npy cannot be read"),
        (lambda folder: np.save(folder / "labels.npy", np.full(214, 77)), "damaged"),
        (lambda folder: np.save(folder / "labels.npy", np.zeros(3, np.int32)), "damaged"),
        (
            lambda folder: np.save(folder / "labels.npy", np.full(214, 0.4)),
            r"labels\.npy has numbers \[214\] of float64",
        ),
        (
            lambda folder: np.save(folder / "labels.npy", np.zeros((214, 1), int)),
            r"has numbers \[214, 1\] of int64, not",
        ),
        (lambda folder: np.save(folder / "images.npy", np.zeros((214, 5, 9, 9), np.uint8)), "not uint8 .n, 1 or 3,"),
        (lambda folder: np.save(folder / "images.npy", np.zeros((214, 1, 0, 9), np.uint8)), "not uint8 .n, 1 or 3,"),
        (lambda folder: hold_out(folder, [-1]), "has no lists of identities and sources, or places outside them"),
        (lambda folder: hold_out(folder, [True]), "or places outside them"),
        (lambda folder: hold_out(folder, [[0]]), "or places outside them"),
        (lambda folder: hold_out(folder, "all"), "holds out all that it has, which leaves nothing to train on"),
    ],
)
def test_a_damaged_data_set_is_refused(made, tmp_path, damage, message):
    folder = tmp_path / "set"
    shutil.copytree(made, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(folder=str(folder)), seed=0)


def test_settings_that_do_not_fit_are_refused(made):
    for config, message in (
        (DataConfig(folder=str(made), image_size=112), "32 pixels and 1 channel"),
        (DataConfig(folder=str(made), channels=3), "32 pixels and 1 channel"),
        (DataConfig(folder=str(made), holdout_identities=3), "its own held-out identities"),
        (DataConfig(folder=str(made), identities=33), "there are 32 in the packed data set"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(config, seed=0)


def test_counting_finds_a_wrong_data_set(made, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(made, folder)
    assert verify(folder)
    images = np.load(folder / "images.npy")
    images[7] = 0
    np.save(folder / "images.npy", images)
    with pytest.raises(UserError, match="1 blank images"):
        verify(folder)


def test_ranges_are_merged():
    assert parse_ranges("hangul,U+AC00-AC05,41-5A,5B,0x5C") == ((0x41, 0x5C), (0xAC00, 0xD7A3))
