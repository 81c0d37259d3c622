"""The report page holds every figure, escapes its input and loads nothing from elsewhere; plots are PNG files."""

import base64
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from partial_fc.training.evaluation import Evaluation, evaluate_embeddings
from partial_fc.training.report.canvas import DPI
from partial_fc.training.report.plots import plot_histograms, plot_roc
from partial_fc.training.report.report import write_report
from partial_fc.training.report.training_plots import plot_training

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def evaluations() -> list[Evaluation]:
    generator = torch.Generator().manual_seed(0)
    results = []
    for name, identities, images in (("faces", 40, 6), ("few", 8, 3)):
        labels = torch.arange(identities).repeat_interleave(images)
        centres = torch.randn(identities, 16, generator=generator)
        embeddings = centres[labels] + torch.randn(len(labels), 16, generator=generator)
        results.append(evaluate_embeddings(embeddings, labels, name=name))
    return results


def history(rows: int, **more: float) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * i,
            "epoch": i // 50,
            "loss": 40 * math.exp(-i / 100) + 0.1 * math.sin(i),
            "target_angle": 0.5 + math.exp(-i / 200),
            "learning_rate": 0.1 / (i + 1),
            **more,
        }
        for i in range(rows)
    ]


MEASURED = {
    "accuracy": 0.875,
    "margin_met": 0.25,
    "embedding_norm": 11.5,
    "hardest_angle": 1.0,
    "target_angle_p10": 0.4,
    "target_angle_p90": 0.9,
}


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG that ends as it should."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


class Page(HTMLParser):
    """The text and the attributes of a page, to be searched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path, evaluations: list[Evaluation], **changes: Any) -> tuple[Path, str]:
    arguments: dict[str, Any] = {
        "title": "run 7",
        "metrics": {"evaluations": [evaluation.to_dict(curves=False) for evaluation in evaluations], "steps": 4321},
        "config": {"seed": 3, "head": {"margin": [1.0, 0.5, 0.0], "scale": 64.0}, "optim": {"groups": [{"lr": 0.1}]}},
        "environment": {"torch": "2.13.0", "world size": "2", "throughput": "1,234 images/s"},
        "history": history(100),
        **changes,
    }
    path = write_report(folder, **arguments)
    return path, path.read_text(encoding="utf-8")


def test_report_holds_every_figure(tmp_path: Path, evaluations: list[Evaluation]):
    path, page = written(tmp_path, evaluations)
    assert path == tmp_path / "report.html"
    text = Page(page).text
    for result in evaluations:
        assert result.accuracy is not None
        counts = (result.images, result.identities, result.genuine_pairs, result.impostor_pairs)
        shares = [
            share for share in (*result.tar.values(), result.eer, result.accuracy, result.rank1) if share is not None
        ]
        expected = [result.name, *(f"{count:,}" for count in counts), *(f"{100 * share:.2f} %" for share in shares)]
        assert [part for part in expected if part not in text] == []
        assert f"± {100 * result.accuracy_std:.2f}" in text
    # FAR 1e-4 and 1e-5 of the first set, all but none of the second (252 impostor pairs): a dash each.
    assert len(re.findall("<td>—</td>", page)) == sum(tar is None for e in evaluations for tar in e.tar.values()) == 6
    for part in ("4,321", "head", "margin", "1, 0.5, 0", "groups.0.lr", "2.13.0", "1,234 images/s", "990", "63.6°"):
        assert part in text, part


def test_report_escapes_what_it_is_given(tmp_path: Path, evaluations: list[Evaluation]):
    hostile = evaluations[0].to_dict() | {"name": HOSTILE}
    _, page = written(
        tmp_path,
        evaluations,
        title=HOSTILE,
        metrics={"evaluations": [hostile], HOSTILE: HOSTILE},
        config={HOSTILE: HOSTILE, "data": {HOSTILE: [HOSTILE, {"path": HOSTILE}]}},
        environment={HOSTILE: HOSTILE},
    )
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count(HOSTILE) >= 10


def test_report_embeds_the_plots_that_exist_and_nothing_external(tmp_path: Path, evaluations: list[Evaluation]):
    (tmp_path / "plots").mkdir()
    plot_roc(tmp_path / "plots" / "roc.png", evaluations)
    plot_training(tmp_path / "plots" / "training.png", history(20))
    _, page = written(tmp_path, evaluations)
    parsed = Page(page)
    images = [attributes["src"] or "" for tag, attributes in parsed.tags if tag == "img"]
    embedded = [base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True) for image in images]
    assert embedded == [(tmp_path / "plots" / name).read_bytes() for name in ("roc.png", "training.png")]
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object"}
    for _, attributes in parsed.tags:
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"data:image/png;base64,[^\"]+", "", page))


def test_report_of_a_run_without_evaluation_or_steps(tmp_path: Path):
    _, page = written(tmp_path, [], metrics={}, history=[], config={"seed": None, "extra": {}}, environment={})
    text = Page(page).text
    assert "No evaluation was run" in text
    assert "Training log" not in text
    assert "<img" not in page


def test_report_shows_the_first_and_the_last_row_of_a_long_history(tmp_path: Path, evaluations: list[Evaluation]):
    rows = history(20_000)
    rows[-1] |= {"loss": math.nan, "grad_norm": 2.5}
    _, page = written(tmp_path, evaluations, history=rows)
    log = page[page.index("Training log") : page.index("Environment")]
    assert log.count("<tr>") == 13  # headings and twelve rows
    assert "<td>0</td>" in log
    assert "<td>199,990</td><td>399</td><td>—</td>" in log
    assert "gradient norm" in log


def test_report_tells_what_was_measured_in_training(tmp_path: Path, evaluations: list[Evaluation]):
    _, page = written(tmp_path, evaluations, history=history(3, **MEASURED, center_loss=1.25))
    log = page[page.index("Training log") : page.index("Environment")]
    for part in (
        "accuracy",
        "87.5 %",
        "margin met",
        "25.0 %",
        "length",
        "11.5",
        "nearest other",
        "57.3°",
        "center loss",
        "1.25",
    ):
        assert part in log, part


def test_plots_are_png_of_the_expected_size(tmp_path: Path, evaluations: list[Evaluation]):
    width = round(7.2 * DPI)
    plot_roc(tmp_path / "roc.png", evaluations)
    assert png_size(tmp_path / "roc.png") == (width, round(4.85 * DPI))
    for count in (1, 2):
        plot_histograms(tmp_path / "histograms.png", evaluations[:count])
        assert png_size(tmp_path / "histograms.png") == (width, round((1.0 + 2.7 * count) * DPI))
    state = {"center_loss": 3.0, "adaface_mean": 12.0, "curricular_t": 0.5, "grad_norm": 1.5}
    cases: list[tuple[int, dict[str, float], int]] = [
        (20, {}, 3),
        (20_000, {}, 3),
        (1, {}, 3),
        (200, {"grad_norm": 1.5}, 4),
    ]
    cases += [
        (20, MEASURED, 5),
        (200, MEASURED | state, 8),
        (20, {"target_angle_p10": math.nan, "accuracy": math.nan}, 3),
    ]
    for rows, more, panels in cases:
        plot_training(tmp_path / "training.png", history(rows, **more))
        assert png_size(tmp_path / "training.png") == pytest.approx((width, (0.8 + 2.3 * panels) * DPI), abs=1)


def test_plots_of_nothing_and_of_gaps_are_drawn(tmp_path: Path):
    plot_roc(tmp_path / "roc.png", [])
    plot_histograms(tmp_path / "histograms.png", [])
    plot_training(tmp_path / "training.png", [])
    collapsed = evaluate_embeddings(torch.ones(6, 4), torch.arange(6) // 2, name="one point")
    plot_roc(tmp_path / "collapsed.png", [collapsed])
    plot_histograms(tmp_path / "panels.png", [collapsed])
    rows = history(100)
    rows[3]["loss"], rows[50]["loss"] = math.nan, math.inf
    del rows[4]["target_angle"]
    plot_training(tmp_path / "gaps.png", rows)
    for name in ("roc", "histograms", "training", "collapsed", "panels", "gaps"):
        assert min(png_size(tmp_path / f"{name}.png")) > 200


def test_plots_are_deterministic_and_leave_the_style_alone(tmp_path: Path, evaluations: list[Evaluation]):
    before = dict(matplotlib.rcParams)
    plot_histograms(tmp_path / "a.png", evaluations)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        plot_histograms(tmp_path / "b.png", evaluations)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
