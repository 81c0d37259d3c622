"""`partial-fc audit` finds faults planted in a folder of images, on one rank and on two; mistakes print one line."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import args
from forked import finish, fork
from PIL import Image

from partial_fc import PartialFC
from partial_fc.distributed.shards import local_part
from partial_fc.training import audit
from partial_fc.training.cli.main import main
from partial_fc.training.data import GlyphIdentities, scan_folder
from partial_fc.training.errors import UserError

TWICE, OF, BROKEN = "twice", "id020", ("broken_a", "broken_b", "broken_c", "broken_d")
IMAGES = ["--data.image_size", "32", "--data.channels", "1"]
SETTINGS = [
    "--train.batch_size",
    "32",
    "--train.cpu",
    "true",
    "--head.margin.scale",
    "32",
    "--backbone.embedding_size",
    "64",
]


def planted(root: Path) -> Path:
    """56 characters, ten images each: five of one of them are under a second name; four identities have one image,
    which is damaged."""
    glyphs = GlyphIdentities("train", 56)
    for i in range(len(glyphs)):
        name = f"id{int(glyphs.labels[i]):03d}"
        folder = root / (TWICE if name == OF and i % 10 in (0, 3, 4, 7, 8) else name)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(glyphs.load(i)[0].numpy()).save(folder / f"{i:04d}.png")
    for name in BROKEN:
        (root / name).mkdir()
        (root / name / "0.png").write_bytes(b"this is no picture")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audit")
    planted(root / "data")
    own = ["--output.folder", str(root / "run"), "--data.folder", str(root / "data"), "--train.epochs", "12"]
    assert main(["train", *own, *IMAGES, *SETTINGS]) == 0
    return root


@pytest.fixture(scope="module")
def hardly_trained(trained: Path) -> Path:
    """A run in which one class a step is drawn beside those of the batch, for 17 steps of one epoch: 43 of 60 are never
    drawn."""
    run = trained / "short"
    own = [
        "--output.folder",
        str(run),
        "--data.folder",
        str(trained / "data"),
        *args("--train.epochs 1 --head.sample_rate 0.01"),
    ]
    assert main(["train", *own, *IMAGES, *SETTINGS]) == 0
    return run


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_an_identity_that_is_stored_twice_is_the_first_pair(trained, capsys):
    out = trained / "out"
    assert main(["audit", str(trained / "run"), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    pairs = table(out / "duplicates.csv")
    assert {pairs[0]["identity_a"], pairs[0]["identity_b"]} == {TWICE, OF}
    assert len(pairs) < 6, "few others are beyond the threshold of this run"
    assert f"{len(pairs)} pairs" in said
    names = sorted(scan_folder(trained / "data")[0])
    assert [names[int(pairs[0][f"class_{side}"])] for side in "ab"] == [pairs[0]["identity_a"], pairs[0]["identity_b"]]
    assert (pairs[0]["images_a"], pairs[0]["images_b"]) == ("5", "5")

    found = json.loads((out / "audit.json").read_text())
    assert (found["classes"], found["images"], found["without_readable_images"]) == (61, 560, 4)
    assert found["duplicate_pairs"] == len(pairs)
    assert float(pairs[0]["mean_cosine"]) >= found["mean_threshold"]

    drift = table(out / "drift.csv")
    cosines = [float(row["cosine"]) for row in drift]
    assert cosines == sorted(cosines) and len(drift) == 57, "classes without a readable image have no mean"
    assert not {row["identity"] for row in drift} & set(BROKEN)
    assert sum(int(row["images"]) for row in drift) == 560


def test_the_page_holds_everything_it_shows(trained):
    out = trained / "page"
    assert main(["audit", str(trained / "run"), "--output", str(out), "--threshold", "0.2"]) == 0
    page = (out / "report.html").read_text()
    pictures = re.findall(r'src="([^"]+)"', page)
    assert pictures and all(each.startswith("data:image/png;base64,") for each in pictures)
    assert all(base64.b64decode(each.split(",", 1)[1])[:4] == b"\x89PNG" for each in pictures)
    assert TWICE in page and OF in page and "<script" not in page
    assert (out / "plots" / "cosines.png").read_bytes()[:4] == b"\x89PNG"
    rows = table(out / "duplicates.csv")
    assert json.loads((out / "audit.json").read_text())["row_threshold"] == 0.2
    assert sum(float(row["row_cosine"] or -1) >= 0.2 for row in rows) > 20, (
        "all pairs beyond the threshold asked for are in the file"
    )


def test_classes_that_no_step_has_touched(hardly_trained, tmp_path):
    """Broken identities are in no batch; those that no draw has met either still have their initial rows."""
    out = tmp_path / "out"
    assert main(["audit", str(hardly_trained), "--output", str(out)]) == 0
    unmoved = [row["identity"] for row in table(out / "never_updated.csv")]
    assert unmoved and set(unmoved) <= set(BROKEN)
    assert {row["images"] for row in table(out / "never_updated.csv")} == {"0"}
    page = (out / "report.html").read_text()
    assert all(name in page.split("Classes never updated", 1)[1] for name in unmoved)
    assert json.loads((out / "audit.json").read_text())["never_updated"] == len(unmoved)


@pytest.mark.slow
def test_two_ranks_find_the_same(trained, hardly_trained, tmp_path):
    for run in (trained / "run", hardly_trained):
        one, two = tmp_path / f"{run.name}-one", tmp_path / f"{run.name}-two"
        assert main(["audit", str(run), "--output", str(one)]) == 0
        code, _, err = finish(fork("audit", str(run), "--output", str(two)))
        assert code == 0, err[-3000:]
        for name in ("duplicates.csv", "never_updated.csv", "drift.csv"):
            a, b = table(one / name), table(two / name)
            assert len(a) == len(b)
            for key in ("class", "class_a", "class_b", "identity", "images", "nearest_class"):
                assert sorted(row.get(key, "") for row in a) == sorted(row.get(key, "") for row in b)
        a, b = ({row["class"]: float(row["cosine"]) for row in table(each / "drift.csv")} for each in (one, two))
        assert a == pytest.approx(b, abs=2e-5)


# ---------------------------------------------------------------------------------------------------- its parts


def _initial(rank: int, world: int) -> list[bool]:
    head = PartialFC(4, 2100, seed=7)
    rows, lo = local_part(head.weight.detach()), head.shards.lo
    for c in (0, 1500, 2099):
        if lo <= c < head.shards.hi:
            rows[c - lo, 3] += 1e-5
    rows[100:110] *= 0.37  # decay
    return audit._updated(rows, lo, std=0.01, seed=7).tolist()


def test_a_row_that_was_turned_is_told_from_its_draw(ranks):
    for world in (1, 3):
        moved = [each for part in ranks(world).run(_initial) for each in part]
        assert [c for c, each in enumerate(moved) if each] == [0, 1500, 2099]
    assert sum(_initial(0, 1)) == 3


def test_a_row_is_compared_by_its_best_center():
    rows = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [-1.0, 0.0]]])
    assert audit._cosines(rows, torch.tensor([[0.0, 3.0], [1.0, 0.0]])).tolist() == pytest.approx([1.0, math.sqrt(0.5)])
    assert audit._cosines(rows[:0], torch.empty(0, 2)).shape == (0,)


def test_the_threshold_is_an_outer_fence():
    z = torch.linspace(0.2, 0.6, 5, dtype=torch.float64)
    assert audit._outer_fence(z.tanh()) == pytest.approx(math.tanh(0.5 + 3 * 0.2))
    assert audit._outer_fence(torch.cat((z.tanh(), torch.tensor([math.nan])))) == pytest.approx(
        math.tanh(0.5 + 3 * 0.2)
    )
    assert audit._outer_fence(torch.full((3,), math.nan)) == 1.0
    assert 0.9999 < audit._outer_fence(torch.ones(9)) <= 1.0


# ---------------------------------------------------------------------------------------------------- mistakes


def wrong(kind: str, trained: Path, tmp_path: Path) -> tuple[list[str], str]:
    run, out = str(trained / "run"), ["--output", str(tmp_path / "out")]
    if kind == "no run":
        return [str(tmp_path), *out], "is not a run folder"
    if kind == "no checkpoint":
        shutil.copytree(trained / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
        return [str(tmp_path / "copy"), *out], "has no complete checkpoint"
    if kind == "other classes":
        shutil.copytree(trained / "data", tmp_path / "data", ignore=shutil.ignore_patterns(OF))
        return [run, *out, "--data", str(tmp_path / "data")], "does not fit the 60 classes of the data set"
    if kind == "no data":
        return [run, *out, "--data", str(tmp_path / "nowhere")], "nowhere does not exist"
    if kind == "threshold":
        return [run, *out, "--mean_threshold", "1.5"], "--mean_threshold is 1.5"
    if kind == "unknown setting":
        return [run, *out, "--depth", "3"], "--depth"
    if kind == "no argument":
        return [], "required: run"
    if kind == "unreadable":
        return [run, *out, "--on_error", "raise"], "cannot read the image broken_"
    assert kind == "folder in use"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    return [run, *out], "is in use; choose another --output"


KINDS = [
    "no run",
    "no checkpoint",
    "other classes",
    "no data",
    "threshold",
    "unknown setting",
    "no argument",
    "unreadable",
    "folder in use",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_one_line_and_leaves_nothing(trained, tmp_path, mistake, kind):
    arguments, told = wrong(kind, trained, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert told in mistake("audit", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kind", ["other classes", *(pytest.param(k, marks=pytest.mark.slow) for k in ("unreadable", "folder in use"))]
)
def test_of_two_ranks_one_speaks_and_both_end(trained, tmp_path, kind):
    arguments, told = wrong(kind, trained, tmp_path)
    code, _, err = finish(fork("audit", *arguments))
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("partial-fc: error: ")]
    assert len(lines) == 1 and told in lines[0], err[-3000:]


def test_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--help"])
    assert ended.value.code == 0
    assert "--mean_threshold" in capsys.readouterr().out


def test_the_gpu_is_chosen_before_anything_is_built(trained, tmp_path, monkeypatch, mistake):
    def no_device(cpu: bool) -> None:
        raise UserError("devices were looked at")

    monkeypatch.setattr("partial_fc.training.cli.audit.check_devices", no_device)
    assert "devices were looked at" in mistake("audit", trained / "run", "--output", tmp_path / "out")
