"""The pages of runs open in a real browser without complaints; runs are compared side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from common import args

from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import save_config, to_config
from partial_fc.training.protocols import identify_embeddings, retrieve_embeddings, score_templates, verify_embeddings
from partial_fc.training.results import write_results
from partial_fc.training.run import CONFIG, RunFolder

LOOK = """({
    images: document.images.length,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
    text: document.body.innerText,
})"""
COMMON = args("train --data.identities 40 --train.batch_size 64 --train.epochs 1 --train.cpu true --output.log_every 1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("arc", []), ("cos", ["--head.margin", "CosFace", "--head.sample_rate", "0.5"])):
        assert main([*COMMON, *more, "--output.folder", str(root / name)]) == 0
    return [root / "arc", root / "cos"]


def protocol_run(folder: Path, seed: int, noise: float) -> Path:
    """A run that was evaluated by all protocols, and on nothing else, at its end and three times before."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20).repeat_interleave(4)
    centres = torch.randn(30, 32, generator=generator)

    def images(of: torch.Tensor) -> torch.Tensor:
        return centres[of] + noise * torch.randn(len(of), 32, generator=generator)

    same = torch.arange(200) % 2 == 0
    first = torch.randint(0, 30, (200,), generator=generator)
    pairs = torch.stack((images(first), images(torch.where(same, first, (first + 1) % 30))), dim=1).flatten(0, 1)
    which = torch.combinations(torch.arange(80))
    results = [
        verify_embeddings(pairs, same, name="lfw"),
        score_templates(
            torch.arange(80), images(labels), which, labels[which[:, 0]] == labels[which[:, 1]], name="ijb"
        )[0],
        identify_embeddings(
            images(torch.arange(20)), torch.arange(20), images(torch.arange(30)), torch.arange(30), name="mega"
        ),
        retrieve_embeddings(images(labels), labels, name="shop"),
    ]
    rows: list[dict[str, float]] = [{"step": step, "epoch": 1, "loss": 1 / step} for step in range(1, 9)]
    rows += [
        {"step": step, "epoch": 1, "lfw/accuracy": 0.5 + step / 40, "lfw/eer": 0.2, "shop/mAP": 0.25}
        for step in (2, 4, 8)
    ]
    config = to_config(
        train_parser(), ["--seed", str(seed), "--evaluation.every", "1", "--evaluation.best", "lfw/accuracy"]
    )
    run = RunFolder(folder)
    folder.mkdir()
    save_config(config, folder / CONFIG)
    for row in rows:
        run.append_history(row)
    write_results(
        run,
        "protocols",
        [],
        {"training": {"steps": 8, "seconds": 1.0, "images_per_second": 64.0}},
        config,
        {},
        rows,
        results,
    )
    return folder


@pytest.fixture(scope="module")
def protocol_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("protocols")
    return [protocol_run(root / "good", 0, 0.8), protocol_run(root / "bad", 1, 1.6)]


def test_the_browser_notices_what_is_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<script>console.error("first"); setTimeout(() => 0, 0); nothing.there</script><img src="missing.png">'
    )
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
    for title in (
        "Hardest genuine pairs: seen",
        "Hardest impostor pairs: new",
        "Nearest classes",
        "Plots",
        "Environment",
        "Configuration",
    ):
        assert title in seen.evaluated["headings"]
    assert "images per second" in seen.evaluated["text"]
    assert "of training time spent waiting for data" in seen.evaluated["text"]


def test_runs_side_by_side_open_without_complaint(browser, runs, tmp_path, capsys):
    page = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert f"comparison of 2 runs written to {page}" in capsys.readouterr().out
    for width in (1100, 390):
        seen = browser.open(page, width=width, evaluate=LOOK)
        assert (seen.complaints, seen.requests, seen.evaluated["broken"]) == ([], [], 0)
        assert seen.evaluated["wider"] <= 0
        assert seen.evaluated["images"] == 6  # ROC of two sets, and four numbers of the log
    assert seen.evaluated["headings"] == ["Settings that differ", "seen", "new", "Other figures", "Curves"]


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
    assert settings.count("<tr>") == 8  # heads, margin, its margin and three forms, sample_rate, folder of the output
    assert (
        "<code>head.margin</code></td><td><code>ArcFace</code></td><td><code>CosFace</code></td><td><code>ArcFace</code>"
        in settings
    )
    assert '<td class="best">0.00 %</td><td>—</td>' in text[text.index("<td>eer") :].split("</tr>")[0]
    assert "<td>tar.other</td><td>—</td><td>50.00 %</td><td>—</td>" in text
    assert "<td>lately measured.here</td><td>—</td><td>7</td><td>—</td>" in text
    assert "<b>" not in text
    assert "&lt;b&gt;unfinished" in text


def test_a_report_draws_what_protocols_found(browser, protocol_runs):
    run = protocol_runs[0]
    assert sorted(path.name for path in (run / "plots").iterdir()) == [
        "cmc.png",
        "dir.png",
        "histograms.png",
        "roc.png",
        "training.png",
    ]
    curves = {each["name"]: each for each in json.loads((run / "curves.json").read_text())}
    assert {name: sorted(each["curves"]) for name, each in curves.items()} == {
        "lfw": ["roc"], "ijb": ["roc"], "mega": ["cmc", "dir"], "shop": ["cmc"]
    }  # fmt: skip
    for name in ("lfw", "ijb"):
        assert [sum(curves[name]["histograms"][kind]) for kind in ("genuine", "impostor")] == [
            curves[name]["counts"][kind] for kind in ("genuine", "impostor")
        ]
        assert curves[name]["curves"]["roc"][-1] == [1, 1]
    for width in (1100, 390):
        seen = browser.open(run / "report.html", width=width, evaluate=LOOK)
        assert (seen.complaints, seen.requests, seen.evaluated["broken"], seen.evaluated["images"]) == ([], [], 0, 5)
        assert seen.evaluated["wider"] <= 0
    assert all(
        part in seen.evaluated["text"] for part in ("accuracy, lfw", "ijb (templates)", "rank-1 ", "mAP ", "dir@1e-1 ")
    )


def test_protocols_are_laid_side_by_side(browser, protocol_runs, tmp_path):
    page = tmp_path / "no/such/folder/both.html"
    assert main(["report", *map(str, protocol_runs), "--output", str(page)]) == 0
    text = page.read_text()
    figures = [
        {each["name"]: each["figures"] for each in json.loads((run / "metrics.json").read_text())["protocols"]}
        for run in protocol_runs
    ]
    for name, protocol, keys in (
        ("lfw", "verification", ("accuracy", "tar@1e-1", "eer")),
        ("ijb", "templates", ("tar@1e-2", "eer")),
        ("mega", "identification", ("rank-1", "dir@1e-1")),
        ("shop", "retrieval", ("mAP", "cmc@1", "recall@5", "R-precision", "mAP@R")),
    ):
        table = text[text.index(f"<h2>{name} ({protocol})") :].split("</table>")[0]
        for key in keys:
            good, bad = (f"{100 * each[name][key]:.2f} %" for each in figures)
            assert good != bad
            assert f'<td>{key}</td><td class="best">{good}</td><td>{bad}</td>' in table, key
        assert f"<td>{'accuracy_std' if name == 'lfw' else keys[0]}</td>" in table
    assert "{" not in text[text.index("<body>") :]
    rest = text[text.index("<h2>Other figures") :].split("</table>")[0]
    assert "<td>best during training.lfw/accuracy</td><td>70.00 %</td><td>70.00 %</td>" in rest
    assert "rows" not in rest and "protocols" not in rest
    seen = browser.open(page, evaluate=LOOK)
    assert (seen.complaints, seen.requests, seen.evaluated["broken"], seen.evaluated["wider"]) == ([], [], 0, 0)
    assert seen.evaluated["images"] == 8  # two ROC, a DIR, two CMC, the loss, figures of two sets during training


def test_runs_without_protocols_have_no_row_of_them(runs, tmp_path):
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "both.html")]) == 0
    assert "<td>protocols" not in (tmp_path / "both.html").read_text()


def test_folders_of_evaluations_are_laid_side_by_side(protocol_runs, tmp_path):
    for run in protocol_runs:
        shutil.copytree(run, tmp_path / run.name / "verify-lfw")
        for name in (CONFIG, "history.jsonl"):
            (tmp_path / run.name / "verify-lfw" / name).unlink()
    page = tmp_path / "both.html"
    assert (
        main(["report", *(str(tmp_path / run.name / "verify-lfw") for run in protocol_runs), "--output", str(page)])
        == 0
    )
    text = page.read_text()
    assert "<th>good/verify-lfw</th><th>bad/verify-lfw</th>" in text
    assert "<h2>lfw (verification)" in text and '<p class="note">None.</p>' in text


def test_what_cannot_be_laid_side_by_side_is_said(runs, tmp_path, mistake):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0], damaged)
    (damaged / "metrics.json").write_text("[")
    for arguments, message in (
        ([str(tmp_path)], "is not a run folder"),
        ([str(damaged)], "damaged cannot be read"),
        ([str(runs[0]), str(runs[0])], "given twice"),
        ([str(runs[0]), "--output", str(tmp_path)], "is a folder; give the name of a file"),
        (
            [str(damaged), "--output", str(damaged / "metrics.json" / "x.html")],
            "is not a writable folder",
        ),
        ([], "required"),
    ):
        assert message in mistake("report", *arguments)
