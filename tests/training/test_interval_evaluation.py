"""Evaluation during training leaves the training as it is; the best checkpoint is kept; the protocols as commands and
in the report."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import image_folder
from forked import finish, fork, succeed
from launched import logged
from PIL import Image

from partial_fc import Checkpointer
from partial_fc.training import run_evaluation
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.embedding import Embedder
from partial_fc.training.errors import UserError
from partial_fc.training.interval import check_metric, during_training, undisturbed
from partial_fc.training.run import RunFolder
from partial_fc.training.saved import backbone_in
from partial_fc.training.trainer import Trainer

EVERYTHING = ["verification", "templates", "identification", "retrieval"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch marker-of-a-payload",)


def pictures(root: Path, identities: list[str], images: int, seed: int, name: str = "{k}.png") -> None:
    rng = np.random.default_rng(seed)
    for identity in identities:
        color = np.random.default_rng(sum(map(ord, identity))).integers(0, 255, (1, 1, 3))
        for k in range(images):
            pixels = np.clip(color + rng.integers(-90, 90, (20, 16, 3)), 0, 255).astype(np.uint8)
            file = root / (name if "{identity}" in name else f"{identity}/{name}").format(k=k, identity=identity)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, and files of every protocol."""
    root = tmp_path_factory.mktemp("files")
    image_folder(root / "train", 8, 8)
    names = [f"p{i}" for i in range(6)]
    pictures(root / "mega/gallery", names[:4], 1, 1)
    pictures(root / "mega/probes", names, 3, 2)
    pictures(root / "mega/distractors", ["others"], 5, 3)
    pictures(root / "shop/query", names, 1, 4, "{identity}_c1_{k}.png")
    pictures(root / "shop/gallery", [*names, "-1"], 3, 5, "{identity}_c{k}_0.png")
    pictures(root / "ijb/images", names, 4, 6, "{identity}_{k}.png")
    lines = [f"{name}_{k}.png {2 * i + k // 2} {k}" for i, name in enumerate(names) for k in range(4)]
    (root / "ijb/x_face_tid_mid.txt").write_text("\n".join(lines))
    pairs = [f"{a} {b} {int(a // 2 == b // 2)}" for a in range(12) for b in range(a)]
    (root / "ijb/x_template_pair_label.txt").write_text("\n".join(pairs))
    rng = np.random.default_rng(7)
    images = []
    for i in range(20):
        colors = rng.integers(0, 255, (2, 1, 1, 3))
        for side in (0, (i + 1) % 2):
            pixels = np.clip(colors[side] + rng.integers(-90, 90, (20, 16, 3)), 0, 255).astype(np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            images.append(out.getvalue())
    (root / "lfw.bin").write_bytes(pickle.dumps((images, [i % 2 == 1 for i in range(20)]), protocol=2))
    images[3] = b"no picture"
    (root / "damaged.bin").write_bytes(pickle.dumps((images, [i % 2 == 1 for i in range(20)])))
    (root / "evil.bin").write_bytes(pickle.dumps((images, [Evil()])))
    return root


def settings(files: Path, out: Path, **more: object) -> list[str]:
    given: dict[str, object] = {
        "data.folder": files / "train", "data.image_size": 32, "data.holdout_identities": 3, "train.batch_size": 16, "train.cpu": "true",
        "train.epochs": 4, "train.keep_last": 1, "output.log_every": 1, "output.folder": out, "head.sample_rate": 0.6,
        "backbone.embedding_size": 32, "head.margin.scale": 16, **more,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def protocols(files: Path) -> dict[str, object]:
    return {
        "evaluation.verification": f"[{files / 'lfw.bin'}]",
        "evaluation.templates": files / "ijb",
        "evaluation.identification": files / "mega",
        "evaluation.retrieval": files / "shop",
        "evaluation.label_pattern": "^-?[^_-]+",
        "evaluation.camera_pattern": r"_c(\d+)",
    }


def trained(arguments: list[str], resume: bool = False) -> Trainer:
    trainer = Trainer(to_config(train_parser(), arguments), resume)
    trainer.train()
    trainer.write_results(trainer.evaluate())
    trainer.close()
    return trainer


def rows(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(of training, of evaluation)."""
    history = logged(folder)
    return [row for row in history if "loss" in row], [row for row in history if "loss" not in row]


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 epochs of 2 steps, evaluated at its end."""
    out = tmp_path_factory.mktemp("plain") / "run"
    trained(settings(files, out))
    return out


@pytest.fixture(scope="module")
def evaluated(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, evaluated by every protocol after every third step and every second epoch."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    every = {"evaluation.every": 2, "evaluation.every_steps": 3, "evaluation.best": "lfw/accuracy"}
    trained(settings(files, out, **protocols(files), **every))
    return out


def test_losses_and_weights_are_bit_for_bit_those_without_evaluation(plain, evaluated):
    (before, nothing), (losses, figures) = rows(plain), rows(evaluated)
    assert losses == before and len(before) == 8 and nothing == []
    assert [row["step"] for row in figures] == [3, 4, 6, 8]
    weights = [torch.load(io.BytesIO(_backbone(folder)), weights_only=True) for folder in (plain, evaluated)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 10
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def _backbone(folder: Path) -> bytes:
    from partial_fc.training.results import load_backbone

    config = to_config(train_parser(), ["--config", str(folder / "config.yaml")])
    out = io.BytesIO()
    torch.save(load_backbone(RunFolder(folder), config, (3, 32, 32)).state_dict(), out)
    return out.getvalue()


def test_every_protocol_has_its_figures_in_history_metrics_and_report(evaluated):
    _, figures = rows(evaluated)
    wanted = {
        "lfw/accuracy",
        "lfw/tar@1e-1",
        "ijb/tar@1e-1",
        "mega/rank-1",
        "shop/mAP",
        "shop/cmc@1",
        "holdout/eer",
        "holdout/rank1",
    }
    for row in figures:
        assert row.keys() >= wanted and all(0 <= row[name] <= 1 for name in wanted)
        assert row["epoch"] == row["step"] / 2
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert [each["protocol"] for each in metrics["protocols"]] == EVERYTHING
    assert [each["name"] for each in metrics["protocols"]] == ["lfw", "ijb", "mega", "shop"]
    for each in metrics["protocols"]:  # the evaluation of the last step
        for name, value in each["figures"].items():
            assert figures[-1].get(f"{each['name']}/{name}") == value
    counts = {each["name"]: each["counts"] for each in metrics["protocols"]}
    assert counts["lfw"] == {"pairs": 20, "genuine": 10, "impostor": 10, "left out": 0}
    assert counts["ijb"] == {"templates": 12, "genuine": 6, "impostor": 60, "left out": 0}
    assert counts["mega"] == {"mated probes": 12, "other probes": 6, "identities": 4, "distractors": 5}
    assert counts["shop"] == {"queries": 6, "queries without an answer": 0, "gallery": 21, "junk": 3}
    best = metrics["during_training"]["best"]
    assert best["value"] == max(row["lfw/accuracy"] for row in figures) and best["metric"] == "lfw/accuracy"
    assert best["step"] == max(row["step"] for row in figures if row["lfw/accuracy"] == best["value"])
    page = (evaluated / "report.html").read_text()
    for part in (
        "lfw",
        "verification",
        "mAP",
        "Evaluation during training",
        f"at step {best['step']}; its checkpoint is kept",
    ):
        assert part in page, part
    for part in ("Hardest genuine pairs: lfw", "Hardest impostor pairs: lfw", "rank-1 100.00 %", "accuracy, lfw"):
        assert part in page, part
    pairs = json.loads((evaluated / "pictures.json").read_text())["sets"]["lfw"]
    assert {kind: len(of_kind) for kind, of_kind in pairs.items()} == {"genuine": 10, "impostor": 10}
    assert all(image["uri"] for of_kind in pairs.values() for pair in of_kind for image in pair["images"])
    for name in ("roc", "histograms", "dir", "cmc"):
        assert (evaluated / f"plots/{name}.png").is_file()
    checkpointer = RunFolder(evaluated).checkpointer()
    assert checkpointer.steps() == sorted({best["step"], 8})
    assert checkpointer.best_so_far() == checkpointer.path(best["step"])


def test_what_an_evaluation_draws_and_switches_is_put_back():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    model[1].eval()
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3).tolist() + np.random.rand(3).tolist()
    torch.manual_seed(5)
    np.random.seed(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        torch.rand(7), np.random.rand(2), model(torch.randn(4, 3))
        assert not torch.equal(model[0].running_mean, before["0.running_mean"])
        model.eval()
        raise ZeroDivisionError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.rand(3).tolist() + np.random.rand(3).tolist() == expected


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("lfw/accuracy", [0.9, 0.7, 0.8, 0.6]),
        ("lfw/eer", [0.1, 0.3, 0.2, 0.4]),
    ],
)
@pytest.mark.slow
def test_the_best_checkpoint_is_kept_through_a_resume_and_can_be_evaluated(
    metric, values, files, tmp_path, monkeypatch, capsys, mistake
):
    """The first epoch is the best, of accuracies and of error rates. The run is cut back to it, and goes on."""
    by_step = dict(zip((2, 4, 6, 8), values, strict=True))
    real = run_evaluation.figures_of
    current: list[Trainer] = []

    def figures_of(*found: Any) -> dict[str, float]:
        return real(*found) | {metric: by_step[current[-1].progress.step]}

    monkeypatch.setattr(run_evaluation, "figures_of", figures_of)
    monkeypatch.setattr(Trainer, "train", lambda self, train=Trainer.train: (current.append(self), train(self)))
    folder = tmp_path / "run"
    given = {"evaluation.every": 1, "evaluation.best": metric, "evaluation.verification": f"[{files / 'lfw.bin'}]"}
    trained(settings(files, folder, **given))
    assert RunFolder(folder).checkpointer().steps() == [2, 8]
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-000000008")
    (tmp_path / "again/metrics.json").unlink()
    trained(settings(files, tmp_path / "again", **given), resume=True)
    assert RunFolder(tmp_path / "again").checkpointer().steps() == [2, 8]
    assert logged(tmp_path / "again") == logged(folder)
    best = json.loads((tmp_path / "again/metrics.json").read_text())["during_training"]["best"]
    assert best == {"metric": metric, "value": values[0], "step": 2}

    if metric == "lfw/eer":
        return
    found = {}
    for which in ("best", "2", "8", "newest"):
        out = tmp_path / which
        assert main(["evaluate", str(folder), "--checkpoint", which, "--output", str(out)]) == 0
        found[which] = json.loads((out / "metrics.json").read_text())["protocols"]
    assert found["best"] == found["2"] and found["newest"] == found["8"] and found["2"] != found["8"]
    capsys.readouterr()
    assert "there is no checkpoint '5'" in mistake(
        "evaluate", str(folder), "--checkpoint", "5", "--output", str(tmp_path / "none")
    )
    assert f"evaluation.best = '{metric}'" in mistake(
        "train", "--resume", str(folder), "--evaluation.best", "lfw/tar@1e-1", "--check"
    )


def test_the_best_of_equal_figures_is_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=4)
    assert checkpointer.best_so_far() is None
    for step, metric in enumerate((0.5, 0.8, 0.8, None)):
        checkpointer.save(step, metric=metric, x=torch.nn.Linear(1, 1))
    assert checkpointer.best_so_far() == checkpointer.path(2)
    assert Checkpointer(tmp_path, best="min").best_so_far() == checkpointer.path(0)
    told = during_training([{"step": s, "a/b": m} for s, m in ((0, 0.5), (1, 0.8), (2, 0.8))], "a/b")
    assert told["best"] == {"metric": "a/b", "value": 0.8, "step": 2}


# ---------------------------------------------------------------------------------------------------- commands


def commands(files: Path, run: Path | str) -> dict[str, list[str]]:
    return {
        "verify": ["verify", str(run), str(files / "lfw.bin"), str(files / "damaged.bin")],
        "templates": [
            "templates", str(run), "--images", str(files / "ijb/images"), "--templates", str(files / "ijb/x_face_tid_mid.txt"),
            "--pairs", str(files / "ijb/x_template_pair_label.txt"),
        ],
        "identify": ["identify", str(run), *(f"--{n}={files / 'mega' / n}" for n in ("gallery", "probes", "distractors"))],
        "retrieve": [
            "retrieve", str(run), *(f"--{n}={files / 'shop' / n}" for n in ("query", "gallery")), "--label", "^-?[^_-]+",
            "--camera", r"_c(\d+)",
        ],
    }  # fmt: skip


def test_the_commands_give_what_the_run_gave(files, evaluated, tmp_path, capsys, mistake):
    last = {each["name"]: each for each in json.loads((evaluated / "metrics.json").read_text())["protocols"]}
    names = {"verify": "lfw", "templates": "ijb", "identify": "mega", "retrieve": "shop"}
    for command, arguments in commands(files, evaluated).items():
        scores = ["--scores", str(tmp_path / "s.npy")] if command == "templates" else []
        assert main([*arguments, *scores, "--output", str(tmp_path / command), "--batch_size", "7", "--tile", "5"]) == 0
        metrics = json.loads((tmp_path / command / "metrics.json").read_text())
        first = metrics["protocols"][0]
        assert first["counts"] == last[names[command]]["counts"]
        assert first["figures"] == pytest.approx(last[names[command]]["figures"])
        plots = {"verify": 2, "templates": 2, "identify": 2, "retrieve": 1}[command]
        pairs = 39 if command == "verify" else 0  # of lfw 20, of damaged all but one
        assert (tmp_path / command / "report.html").read_text().count("<img ") == plots + 2 * pairs
        out = capsys.readouterr().out
        assert first["name"] in out and "look at" in out
        if command == "verify":
            assert metrics["protocols"][1]["counts"]["left out"] == 1 and metrics["unreadable_images"] == 1
            assert "damaged image 3" in (tmp_path / command / "unreadable.txt").read_text()
        if scores:
            assert np.load(tmp_path / "s.npy").shape == (66,)
    assert "damaged image 3" in mistake(*commands(files, evaluated)["verify"], "--on_error", "raise")
    assert not list(evaluated.glob("verify-*")), "a mistake leaves no folder behind"


def test_sub_folders_without_an_image_are_skipped_as_in_training(files, evaluated, tmp_path, capsys, mistake):
    sets = {name: shutil.copytree(files / "mega" / name, tmp_path / name) for name in ("gallery", "probes")}
    (tmp_path / "probes/nothing").mkdir()
    given = {
        "identify": [f"--{name}={folder}" for name, folder in sets.items()],
        "retrieve": [f"--query={sets['probes']}", f"--gallery={sets['gallery']}"],
    }
    for command, options in given.items():
        out = tmp_path / command
        assert main([command, str(evaluated), *options, "--output", str(out)]) == 0
        assert (out / "unreadable.txt").read_text() == "nothing (there is no image in it)\n"
        told = "could not be read and skipped: 1 (images, or folders without one), listed in"
        assert told in capsys.readouterr().out
        line = mistake(command, evaluated, *options, "--output", tmp_path / "strict", "--on_error", "raise")
        assert "cannot read nothing (there is no image in it); fix or remove it, or pass --on_error skip" in line


def test_a_file_of_weights_gives_what_the_run_gives(files, evaluated, tmp_path, capsys, mistake):
    """The backbone of a trainer that knows no runs, by its name: every command, and Embedder.open."""
    checkpoint = RunFolder(evaluated).find_checkpoint()
    weights = tmp_path / "model.pt"
    torch.save(backbone_in(checkpoint), weights)
    numbers = ["--backbone.embedding_size", "32", "--data.image_size", "32", "--data.channels", "3"]
    given = ["--backbone.name", "small", *numbers]
    for command, arguments in commands(files, weights).items():
        assert main([*arguments, *given]) == 0
        (out,) = tmp_path.glob(f"model-{command}-*")
        assert main([*commands(files, evaluated)[command], "--output", str(tmp_path / command)]) == 0
        found, expected = (
            json.loads((folder / "metrics.json").read_text())["protocols"] for folder in (out, tmp_path / command)
        )
        assert [each["figures"] for each in found] == [pytest.approx(each["figures"]) for each in expected]
        assert "Configuration" not in (out / "report.html").read_text(), "settings of a run that never was"
    data = ["--data", str(files / "mega" / "gallery")]
    for source, more, out in ((weights, given, "ours"), (evaluated, [], "theirs")):
        assert (
            main(["evaluate", str(source), *more, "--data", str(files / "train"), "--output", str(tmp_path / out)]) == 0
        )
        assert main(["embed", str(source), *more, *data, "--output", str(tmp_path / f"e-{out}"), "--files", "npz"]) == 0
    ours, theirs = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("ours", "theirs"))
    assert ours["evaluations"] == theirs["evaluations"]
    first, second = (next((tmp_path / f"e-{out}").glob("part-*.npz")) for out in ("ours", "theirs"))
    assert np.array_equal(np.load(first)["embedding"], np.load(second)["embedding"])
    embedder = Embedder.open(weights, backbone="small", embedding_size=32, image_shape=(3, 32, 32))
    assert embedder.digest == Embedder.open(evaluated).digest
    capsys.readouterr()
    pairs = str(files / "lfw.bin")
    for command in (
        ["verify", weights, pairs],
        ["evaluate", weights, *data],
        ["embed", weights, *data, "--output", "x"],
    ):
        assert "say which backbone they are of, --backbone.name" in mistake(*command)
        assert "do not fit the backbone" in mistake(*command, "--backbone.name", "small", *numbers[2:])
        assert "there is no file of weights none.pt" in mistake(command[0], "none.pt", *command[2:], *given)
        assert "is a run, which has its backbone's name" in mistake(command[0], evaluated, *command[2:], *given)
        assert "is for a file of weights" in mistake(command[0], evaluated, *command[2:], *numbers)
        assert "has no checkpoints" in mistake(*command, *given, "--checkpoint", "best")
    assert "has no data set of its own" in mistake("evaluate", weights, *given)
    with pytest.raises(UserError, match="backbone="):
        Embedder.open(weights)


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_refuse_alike(files, evaluated, tmp_path):
    """Each command on two ranks; a hostile file is refused by both, in one line, and its payload does not run."""
    alone = {each["name"]: each for each in json.loads((evaluated / "metrics.json").read_text())["protocols"]}
    names = {"verify": "lfw", "retrieve": "shop", "templates": "ijb", "identify": "mega"}
    for command, name in names.items():
        succeed(*commands(files, evaluated)[command], "--output", str(tmp_path / command), "--tile", "5")
        found = json.loads((tmp_path / command / "metrics.json").read_text())["protocols"][0]
        assert found["counts"] == alone[name]["counts"]
        assert found["figures"] == pytest.approx(alone[name]["figures"])
    code, _, err = finish(fork("verify", str(evaluated), str(files / "evil.bin"), "--output", str(tmp_path / "evil")))
    assert code != 0 and err.count("partial-fc: error:") == 1 and "posix.system" in err
    assert not (tmp_path / "evil").exists() and not list(Path().rglob("marker-of-a-payload"))


@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_same_with_and_without_evaluation(files, tmp_path):
    succeed("train", *settings(files, tmp_path / "plain", **{"train.epochs": 2}))
    every = {"evaluation.every_steps": 1, "evaluation.best": "shop/mAP", "train.epochs": 2}
    out = succeed("train", *settings(files, tmp_path / "evaluated", **protocols(files), **every))
    (losses, _), (others, figures) = rows(tmp_path / "plain"), rows(tmp_path / "evaluated")
    assert losses == others and len(losses) == 4
    assert [row["step"] for row in figures] == [1, 2, 3, 4]
    assert "shop (retrieval)" in out
    best = json.loads((tmp_path / "evaluated/metrics.json").read_text())["during_training"]["best"]
    assert best["value"] == max(row["shop/mAP"] for row in figures)
    assert RunFolder(tmp_path / "evaluated").checkpointer().steps() == sorted({best["step"], 4})


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_embeddings_from_elsewhere(ending, files, tmp_path, capsys, mistake):
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    file = tmp_path / f"rows.{ending}"
    if ending == "npy":
        np.save(file, rows)
    else:
        from safetensors.numpy import save_file

        save_file({"rows": rows}, file)
    assert main(["verify", str(file), str(files / "lfw.bin")]) == 0
    out = tmp_path / "rows-verify-lfw"
    assert f"look at {out / 'report.html'}" in capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())["protocols"][0]
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 2 and "lfw</span> (verification)" in page and "Configuration" not in page
    assert "is in use; choose another --output" in mistake("verify", str(file), str(files / "lfw.bin"))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, same = (unit[::2] * unit[1::2]).sum(1), np.arange(20) % 2 == 1
    allowed = np.sort(cosines[~same])[-2]  # one of ten impostors may pass
    assert found["figures"]["tar@1e-1"] == pytest.approx((cosines[same] > allowed).mean())
    for command, expected in (
        ("identify", "but the images up to probes probes need 22"),
        ("retrieve", "there are 27 images"),
    ):
        if command == "identify":
            np.save(tmp_path / "few.npy", rows[:10])
        assert main(commands(files, tmp_path / "few.npy" if command == "identify" else file)[command]) == 2
        assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["rows-verify-lfw"], (
        "a mistake leaves no folder behind"
    )


def test_mistakes_are_one_line(files, evaluated, tmp_path, mistake):
    given = commands(files, evaluated)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.npy").write_bytes(b"no numbers")
    assert "the following arguments are required: PAIRS.bin" in mistake("verify", str(evaluated))
    assert "not a run folder" in mistake("verify", str(tmp_path), str(files / "lfw.bin"))
    assert "cannot be read" in mistake("verify", str(evaluated), str(tmp_path / "none.bin"))
    assert "posix.system" in mistake("verify", str(evaluated), str(files / "evil.bin"))
    assert "allow_pickle" in mistake("verify", str(tmp_path / "objects.npy"), str(files / "lfw.bin"))
    assert "bad.npy cannot be read" in mistake("verify", str(tmp_path / "bad.npy"), str(files / "lfw.bin"))
    assert "ends with .npy or .txt" in mistake(*given["templates"], "--scores", str(tmp_path / "s.csv"))
    assert "nowhere does not exist" in mistake(
        *given["templates"][:3], str(tmp_path / "nowhere"), *given["templates"][4:]
    )
    assert "no identity of the probes" in mistake(
        *given["identify"][:2], f"--gallery={files / 'train'}", f"--probes={files / 'mega/probes'}"
    )
    other = mistake(*given["identify"][:4], f"--distractors={files / 'mega/gallery'}")
    assert "identity 'p0', which is among the probes" in other
    assert "two files of pairs are called 'lfw'" in mistake(
        "verify", str(evaluated), str(files / "lfw.bin"), str(tmp_path / "lfw.bin")
    )
    assert "does not match the file name" in mistake(*given["retrieve"][:-1], "_d(\\d+)")
    assert "is not a regular expression" in mistake(*given["retrieve"][:-1], "(")
    assert "give at least 1" in mistake(*given["verify"], "--tile", "0")
    train = ["train", *settings(files, tmp_path / "run")]
    assert "needs evaluations during training" in mistake(*train, "--evaluation.best", "holdout/eer")
    assert "is not a figure of this run; choose one of holdout/tar@1e-2" in mistake(
        *train, "--evaluation.every=1", "--evaluation.best", "x/y", "--check"
    )
    assert "evaluation.every is 0" in mistake(*train, "--evaluation.every=0")
    assert "posix.system" in mistake(*train, "--evaluation.verification", f"[{files / 'evil.bin'}]")
    assert "has 0 files *face_tid_mid.txt" in mistake(*train, f"--evaluation.templates={files / 'shop'}")
    assert not (tmp_path / "run").exists() and not list(Path().rglob("marker-of-a-payload"))


def test_two_sets_of_one_name_are_refused():
    config = to_config(train_parser(), []).evaluation
    with pytest.raises(UserError, match="two evaluation sets are called 'seen'"):
        check_metric(config, ["seen", "seen"], [])
    config.every = 1
    with pytest.raises(UserError, match="nothing to evaluate on"):
        check_metric(config, [], [])
