"""Pages that runs leave: opened in a real browser, which must not complain; and runs side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser

from partial_fc.training.cli import main

LOOK = """({
    images: document.images.length,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
    text: document.body.innerText,
})"""
COMMON = [
    "train",
    "--data.identities",
    "40",
    "--train.batch_size",
    "64",
    "--train.epochs",
    "1",
    "--train.cpu",
    "true",
    "--output.log_every",
    "1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("arc", []), ("cos", ["--head.margin", "cosface", "--head.sample_rate", "0.5"])):
        assert main([*COMMON, *more, "--output.folder", str(root / name)]) == 0
    return [root / "arc", root / "cos"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    with Browser() as opened:
        yield opened


def test_the_browser_notices_what_is_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<script>console.error("first"); setTimeout(() => 0, 0); nothing.there</script><img src="missing.png">')
    seen = browser.open(page, evaluate=LOOK)
    assert any("first" in each for each in seen.complaints)
    assert any("nothing is not defined" in each for each in seen.complaints)
    assert seen.requests == [(tmp_path / "missing.png").as_uri()]
    assert seen.evaluated["broken"] == 1


def test_a_report_opens_without_complaint_on_a_screen_and_on_a_phone(browser, runs):
    for width in (1100, 390):
        seen = browser.open(runs[0] / "report.html", width=width, evaluate=LOOK)
        assert seen.complaints == []
        assert seen.requests == []
        assert seen.evaluated["broken"] == 0
        assert seen.evaluated["images"] > 20
        assert seen.evaluated["wider"] <= 0
    for title in ("Hardest genuine pairs: seen", "Hardest impostor pairs: new", "Nearest classes", "Plots", "Environment", "Configuration"):
        assert title in seen.evaluated["headings"]
    assert "images a second" in seen.evaluated["text"]
    assert "of that waiting for data" in seen.evaluated["text"]


def test_runs_side_by_side_open_without_complaint(browser, runs, tmp_path, capsys):
    page = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert f"2 runs are on {page}" in capsys.readouterr().out
    for width in (1100, 390):
        seen = browser.open(page, width=width, evaluate=LOOK)
        assert (seen.complaints, seen.requests, seen.evaluated["broken"]) == ([], [], 0)
        assert seen.evaluated["wider"] <= 0
        assert seen.evaluated["images"] == 6  # ROC of two sets, and four numbers of the log
    assert seen.evaluated["headings"] == ["Settings that differ", "seen", "new", "everything else", "Curves"]


def test_what_differs_is_told_and_the_best_is_marked(runs, tmp_path):
    page = tmp_path / "both.html"
    unfinished = tmp_path / "<b>unfinished"
    shutil.copytree(runs[0], unfinished)
    for name in ("metrics.json", "curves.json", "history.jsonl"):
        (unfinished / name).unlink()
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    metrics["evaluations"][0] |= {"eer": 0.0, "tar": {"1e-2": 1.0, "other": 0.5}, "lately measured": {"here": 7}}
    changed = tmp_path / "changed"
    shutil.copytree(runs[1], changed)
    (changed / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", str(runs[0]), str(changed), str(unfinished), "--output", str(page)]) == 0
    text = page.read_text()
    settings = text[text.index("Settings that differ") : text.index("<h2>seen")]
    assert settings.count("<tr>") == 4  # heads, margin, sample_rate, folder of the output
    assert "<code>head.margin</code></td><td><code>arcface</code></td><td><code>cosface</code></td><td><code>arcface</code>" in settings
    assert '<td class="best">0.00 %</td><td>—</td>' in text[text.index("<td>eer") :].split("</tr>")[0]
    assert "<td>tar.other</td><td>—</td><td>50.00 %</td><td>—</td>" in text
    assert "<td>lately measured.here</td><td>—</td><td>7</td><td>—</td>" in text
    assert "<b>" not in text
    assert "&lt;b&gt;unfinished" in text


def test_what_cannot_be_laid_side_by_side_is_said(runs, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0], damaged)
    (damaged / "metrics.json").write_text("[")
    for arguments, message in (
        ([str(tmp_path)], "is no run folder"),
        ([str(damaged)], "damaged cannot be read"),
        ([str(runs[0]), str(runs[0])], "named twice"),
        ([str(runs[0]), "--output", str(tmp_path)], "is a folder; give a file"),
        ([], "required"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
