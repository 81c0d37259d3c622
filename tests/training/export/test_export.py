"""Exported backbones equal those in torch, their description is enough to use them, and failures leave no files."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from partial_fc.training.backbones import BACKBONES, build_backbone
from partial_fc.training.backbones.small import SmallBackbone
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.data import FolderIdentities
from partial_fc.training.data.augment import to_float
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import evaluate_embeddings
from partial_fc.training.export import export
from partial_fc.training.export.check import BATCHES, TOLERANCE, compare
from partial_fc.training.export.export import export_backbone, load_exported_backbone
from partial_fc.training.export.spec import USAGE
from partial_fc.training.results import embed_images, load_backbone
from partial_fc.training.run import CONFIG, RunFolder

ROOT = Path(__file__).parents[3]
DESCRIPTIONS = {"preprocessing.json", "config.json", "README.md"}
TINY = ["--train.epochs", "1", "--train.cpu", "true", "--backbone.embedding_size", "16"]


def train(folder: Path, *settings: str) -> Path:
    assert main(["train", "--output.folder", str(folder), *TINY, *settings]) == 0
    return folder


def pictures(root: Path, identities: int = 4, images: int = 3) -> Path:
    """Pictures of every kind that differs on its way to 8 bits of grey or colour, none of them square."""
    rng = np.random.default_rng(0)
    for identity in range(identities):
        (root / f"id{identity}").mkdir(parents=True)
        color = rng.integers(0, 255, (1, 1, 3))
        for k in range(images):
            size = (40 + 13 * k, 33 + 5 * identity, 3)
            picture = Image.fromarray(np.clip(color + rng.integers(-90, 90, size), 0, 255).astype(np.uint8))
            path = root / f"id{identity}" / f"{k}.png"
            if identity == 1:
                Image.fromarray(rng.integers(0, 65535, size[:2]).astype(np.uint16)).save(path)
            elif identity == 2:
                picture.quantize(16).save(path)
            elif identity == 3 and k == 0:
                picture.putalpha(100)
                picture.save(path)
            elif identity == 3:
                exif = Image.Exif()
                exif[0x0112] = 6  # "turn me", which the application does not
                picture.save(path.with_suffix(".jpg"), exif=exif)
            else:
                picture.save(path)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on a few glyphs."""
    return train(tmp_path_factory.mktemp("glyphs") / "run", "--data.identities", "20", "--train.batch_size", "64")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "data")


def folder_run(folder: Path, data: Path, *settings: str) -> Path:
    return train(folder, "--data.folder", str(data), "--train.batch_size", "6", *settings)


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def in_torch(run: Path, shape: tuple[int, int, int]) -> nn.Module:
    config = to_config(train_parser(), ["--config", str(run / CONFIG)])
    return load_backbone(RunFolder(run), config, shape).eval()


# ---------------------------------------------------------------------------------------------------- what is exported


def test_the_command_writes_and_tells(run, tmp_path, capsys):
    out = tmp_path / "new" / "exported"
    assert main(["export-backbone", str(run), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"backbone.onnx", "backbone.safetensors", *DESCRIPTIONS}
    assert tree(tmp_path) == {tmp_path / "new", out, *out.iterdir()}
    for path in out.iterdir():
        assert f"{path.name}: {path.stat().st_size:,} bytes" in said
    assert "12 images of seen, new" in said
    figures = re.search(
        r"backbone\.onnx: (\S+) in a batch of 1, (\S+) in a batch of 3, (\S+) in a batch of 8; allowed is 1e-04", said
    )
    assert figures is not None and all(float(each) < TOLERANCE for each in figures.groups())
    assert (out.stat().st_mode & 0o777) == (run.stat().st_mode & 0o777), "made with the rights of any new folder"


def test_the_state_dict_is_the_runs_and_says_how_to_rebuild_the_module(run, tmp_path):
    export_backbone(run, tmp_path / "out", ["safetensors"])
    with safe_open(tmp_path / "out" / "backbone.safetensors", framework="pt") as file:
        said = file.metadata()
    assert {
        key: said[key] for key in ("architecture", "embedding_size", "image_shape", "partial_fc_format", "step")
    } == {
        "architecture": "small",
        "embedding_size": "16",
        "image_shape": "[1, 32, 32]",
        "partial_fc_format": "1",
        "step": "3",
    }
    loaded, trained = load_exported_backbone(tmp_path / "out"), in_torch(run, (1, 32, 32))
    assert not loaded.training
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert int(loaded.features.num_batches_tracked) == 3


def test_the_graph_has_the_promised_interface_and_no_trace_of_the_machine(run, tmp_path):
    export_backbone(run, tmp_path / "out", ["onnx"])
    path = tmp_path / "out" / "backbone.onnx"
    assert {p.name for p in path.parent.iterdir()} == {"backbone.onnx", *DESCRIPTIONS}
    assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()
    assert [(each.domain, each.version) for each in onnx.load(path).opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,), (embeddings,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["n", 1, 32, 32])
    assert (embeddings.name, embeddings.type, embeddings.shape) == ("embeddings", "tensor(float)", ["n", 16])


def test_the_description_names_the_run(run, tmp_path):
    export_backbone(run, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    digest = subprocess.run(["sha256sum", run / CONFIG], capture_output=True, text=True, check=True).stdout.split()[0]
    assert (said["run"]["name"], said["run"]["config_sha256"], said["run"]["step"], said["run"]["epoch"]) == (
        "run",
        digest,
        3,
        1,
    )
    assert (said["channels"], said["height"], said["width"], said["embedding_size"], said["opset"]) == (
        1,
        32,
        32,
        16,
        18,
    )
    assert set(said["largest_difference_from_torch"]["onnx"]) == {"1", "3", "8"}
    assert str(tmp_path) not in json.dumps(said)


@pytest.mark.parametrize(
    ("name", "size"), [("small", 112), *(pytest.param("iresnet18", size, marks=pytest.mark.slow) for size in (32, 112))]
)
def test_every_backbone_exports(name, size, data, tmp_path):
    run = folder_run(tmp_path / "run", data, "--backbone.name", name, "--data.image_size", str(size))
    made = export_backbone(run)
    assert made.folder == run / "exported"
    assert max(made.differences["onnx"].values()) < TOLERANCE
    images = torch.randn(5, 3, size, size).clamp(-1, 1)
    session = onnxruntime.InferenceSession(made.folder / "backbone.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["embeddings"], {"images": images.numpy()})[0])
    with torch.no_grad():
        wanted = in_torch(run, (3, size, size))(images)
    assert (wanted[0] - wanted[1]).abs().max() > 100 * TOLERANCE * wanted.abs().max(), (
        "images are told apart by more than is allowed"
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


class Tied(SmallBackbone):
    """Two names of one weight."""

    def __init__(self, **sizes: object) -> None:
        super().__init__(**sizes)
        self.again = self.fc


def test_tied_weights_are_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "tied", Tied)
    run = train(tmp_path / "run", "--data.identities", "20", "--train.batch_size", "64", "--backbone.name", "tied")
    export_backbone(run, tmp_path / "out")
    loaded = load_exported_backbone(tmp_path / "out")
    assert loaded.again is loaded.fc
    assert torch.equal(loaded.fc.weight, in_torch(run, (1, 32, 32)).fc.weight)


def test_few_images_suffice_and_damaged_ones_are_passed_over(run, tmp_path):
    folder = pictures(tmp_path / "few", 1, 3)
    (folder / "id0" / "0.png").write_bytes(b"this is no picture")
    made = export_backbone(run, tmp_path / "out", ["onnx"], [folder])
    assert made.checked_on == f"2 images of {folder}"
    assert list(made.differences["onnx"]) == list(BATCHES)


# ------------------------------------------------------------------------------------------ from a file to an embedding

WITHOUT_THE_PROJECT = """
import json, sys
sys.modules["partial_fc"] = sys.modules["torch"] = None
names = {}
exec("\\n".join(json.load(open("exported/preprocessing.json"))["usage"]["onnx"]), names)
names["np"].save("found.npy", names["embed"](sys.argv[1:]))
"""


@pytest.mark.parametrize("channels", [1, 3])
def test_the_description_alone_gives_the_embeddings_of_the_evaluation(channels, data, tmp_path):
    run = folder_run(tmp_path / "run", data, "--data.image_size", "32", "--data.channels", str(channels))
    export_backbone(run, tmp_path / "exported")
    config = to_config(train_parser(), ["--config", str(run / CONFIG)])
    images = FolderIdentities(data, 32, channels)
    accelerator = Accelerator(cpu=True)
    wanted, _ = embed_images(
        in_torch(run, images.image_shape), images, "data", accelerator, config, RunFolder(tmp_path)
    )
    files = [str(data / images.name_of(index)) for index in range(len(images))]
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_THE_PROJECT, *files], cwd=tmp_path, check=True, timeout=120)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    assert found.shape == (12, 16)
    wanted = F.normalize(wanted)
    assert torch.pdist(wanted).min() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_lines_of_the_page_are_those_of_the_file_and_run(data, run, tmp_path, monkeypatch):
    first, ours, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert (first, ours) == (USAGE["onnx"], USAGE["safetensors"])
    export_backbone(run, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(first, "export.md", "exec"), names)
    file = data / "id0" / "0.png"
    exec(compile(second, "export.md", "exec"), names)
    with torch.no_grad():
        wanted = F.normalize(names["backbone"](torch.from_numpy(names["prepare"](file))[None]))
    torch.testing.assert_close(torch.from_numpy(names["embed"]([file])), wanted, rtol=0, atol=1e-5)
    names["paths"] = [file]
    exec(compile(ours, "export.md", "exec"), names)
    torch.testing.assert_close(F.normalize(torch.from_numpy(names["embeddings"])), wanted, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- 8 bits, the card


@pytest.fixture(scope="module")
def in_8_bits(run, tmp_path_factory) -> Path:
    """The run's export in all formats."""
    out = tmp_path_factory.mktemp("int8") / "exported"
    export_backbone(run, out, ["safetensors", "onnx", "int8"])
    return out


def test_8_bits_are_smaller_and_near(in_8_bits, data):
    whole, small = (in_8_bits / name for name in ("backbone.onnx", "backbone.int8.onnx"))
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    kinds = {each.op_type for each in onnx.load(small).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert str(ROOT).encode() not in small.read_bytes() and b"site-packages" not in small.read_bytes()
    images = np.stack([each.numpy() for each in GlyphIdentities("seen", 5)._images[:40]]).astype(np.float32) / 127.5 - 1
    found = []
    for path in (whole, small):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [each.shape for each in (*session.get_inputs(), *session.get_outputs())] == [["n", 1, 32, 32], ["n", 16]]
        alone = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
        together = session.run(None, {"images": images})[0]
        assert np.abs(alone - together).max() < 1e-3 * np.abs(alone).max(), "any batch gives the same"
        found.append(F.normalize(torch.from_numpy(together)))
    assert (found[0] * found[1]).sum(1).min() > 0.9
    assert not torch.equal(*found)


def test_the_accuracy_in_8_bits_is_that_of_the_evaluation(run, in_8_bits):
    """float32 in the card is what the run measured; int8 is computed here from the file."""
    card = (in_8_bits / "README.md").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    seen = next(each for each in metrics["evaluations"] if each["name"] == "seen")
    images = GlyphIdentities("seen")
    session = onnxruntime.InferenceSession(in_8_bits / "backbone.int8.onnx", providers=["CPUExecutionProvider"])
    pixels = to_float(torch.stack([images.load(index) for index in range(len(images))]))
    embeddings = torch.cat(
        [torch.from_numpy(session.run(None, {"images": each.numpy()})[0]) for each in pixels.split(64)]
    )
    mine = evaluate_embeddings(embeddings, images.labels, name="seen")
    name = "seen (300 identities, 3,000 images)"
    assert f"| {name} | TAR @ FAR 1e-3 | {seen['tar']['1e-3']:.4f} | {mine.tar['1e-3']:.4f} |" in card
    assert f"| {name} | rank-1 | {seen['rank1']:.4f} | {mine.rank1:.4f} |" in card


def test_the_card_says_what_is_known_and_what_is_to_fill_in(run, in_8_bits, tmp_path):
    card = (in_8_bits / "README.md").read_text()
    _, heading, text = card.split("---\n", 2)
    said = yaml.safe_load(heading)
    assert (said["library_name"], said["license"], said["pipeline_tag"]) == (
        "partial_fc", "other", "image-feature-extraction"
    )  # fmt: skip
    sections = ["Use", "Data", "Training", "Figures", "int8 beside float32", "Intended use", "Limits"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == sections
    assert "| training | 20 | 200 |" in text and "| seen | 300 | 3,000 |" in text
    evaluations = json.loads((run / "metrics.json").read_text())["evaluations"]
    for each in evaluations:
        row = f"| {each['name']} | TAR @ FAR 1e-2 | {each['tar']['1e-2']:.4f} | {each['thresholds']['1e-2']:.4f} |"
        assert row in text
    assert "by `partial-fc evaluate run`" in text
    assert text.count("**TO FILL IN**") == 4 and "Licence: **TO FILL IN**" in text
    assert USAGE["onnx"].strip() in text and USAGE["safetensors"].strip() in text
    assert str(run.parent) not in card
    config = json.loads((in_8_bits / "config.json").read_text())
    assert config["thresholds_at_far"] == {each["name"]: each["thresholds"] for each in evaluations}
    files = {path.name for path in in_8_bits.iterdir()} - {"config.json", "README.md"}
    assert config["sha256"].keys() == files
    for name, digest in config["sha256"].items():
        assert hashlib.sha256((in_8_bits / name).read_bytes()).hexdigest() == digest


def test_figures_of_another_step_are_left_out(run, tmp_path):
    run = copied(run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["training"]["steps"] += 1
    (run / "metrics.json").write_text(json.dumps(metrics))
    for content in (None, "no JSON", "[]", "{}"):
        if content is not None:
            (run / "metrics.json").write_text(content)
        export_backbone(run, tmp_path / "out", ["safetensors"])
        card = (tmp_path / "out" / "README.md").read_text()
        assert "None: its run has no figures of this step. `partial-fc evaluate run --data FOLDER`" in card
        assert "int8" not in card and "onnxruntime" not in card
        shutil.rmtree(tmp_path / "out")


def test_8_bits_alone_are_calibrated_and_measured_on_other_data(run, data, tmp_path, capsys):
    command = ["export-backbone", str(run), "--output", str(tmp_path / "out"), "--formats", "int8"]
    assert main([*command, "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"backbone.int8.onnx", *DESCRIPTIONS}
    assert f"int8 beside float32 on 12 images of {data}" in said and "backbone.onnx:" not in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data (4 identities, 12 images) | rank-1 |" in card and str(data.parent) not in card


def test_a_set_without_pairs_has_no_figures(run, tmp_path):
    folder = pictures(tmp_path / "one", 1, 3)
    (made,) = export_backbone(run, tmp_path / "out", ["int8"], [folder]).compared
    assert (made.float32, made.int8, made.images, made.identities) == (None, None, 3, 1)
    assert "A set without pairs of one identity, or of two" in (tmp_path / "out" / "README.md").read_text()


def test_names_from_elsewhere_are_plain_text_in_the_card(run, tmp_path):
    odd = tmp_path / "a|b <script>`[x](y)*"
    shutil.copytree(run, odd)
    export_backbone(odd, tmp_path / "out", ["safetensors"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# a b script x (y): small" in card and "<script>" not in card


# ---------------------------------------------------------------------------------------------- what cannot be exported


def refused(arguments: list[str], tmp_path: Path, capsys) -> str:
    """The one line that the command says; nothing may have changed."""
    before = tree(tmp_path)
    capsys.readouterr()
    assert main(["export-backbone", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("partial-fc: error: ") and err.count("\n") == 1, err
    assert "written" not in out
    assert tree(tmp_path) == before, "something was left behind"
    return err


@pytest.mark.parametrize(
    "kind",
    [
        "no run", "no checkpoint", "unfinished checkpoint", "existing output",
        "empty output", "output is a file", "output below a file", "output in /proc",
        "unknown format", "no format", "no run named", "missing data", "data unreadable", "own data gone", "several ranks",
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(kind, run, data, tmp_path, capsys, monkeypatch):
    run, out = copied(run, tmp_path), tmp_path / "out"
    arguments, expected = [str(run), "--output", str(out)], ""
    if kind == "no run":
        arguments, expected = [str(tmp_path)], "is not a run folder"
    elif kind == "no checkpoint":
        shutil.rmtree(run / "checkpoints")
        expected = "has no complete checkpoint"
    elif kind == "unfinished checkpoint":
        for manifest in run.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
        expected = "has no complete checkpoint"
    elif kind == "existing output":
        (out / "mine").mkdir(parents=True)
        expected = f"{out} already exists; name another folder with --output"
    elif kind == "empty output":
        out.mkdir()
        expected = "already exists"
    elif kind == "output is a file":
        out.write_text("mine")
        expected = "already exists"
    elif kind == "output below a file":
        out.write_text("mine")
        arguments, expected = [str(run), "--output", str(out / "below")], "cannot be "
    elif kind == "output in /proc":
        arguments, expected = (
            [str(run), "--output", "/proc/exported"],
            "the output folder /proc/exported cannot be created",
        )
    elif kind == "unknown format":
        arguments, expected = (
            [*arguments, "--formats", "onnx", "tflite"],
            "unknown format 'tflite'; choose among safetensors, onnx, int8",
        )
    elif kind == "no format":
        arguments, expected = [*arguments, "--formats"], "--formats"
    elif kind == "no run named":
        arguments, expected = ["--output", str(out)], "RUN"
    elif kind == "missing data":
        arguments, expected = (
            [*arguments, "--data", str(tmp_path / "nowhere")],
            "nowhere does not exist; check --data\n",
        )
    elif kind == "data unreadable":
        folder = tmp_path / "bad" / "a"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"this is no picture")
        arguments, expected = [*arguments, "--data", str(tmp_path / "bad")], "no image of"
    elif kind == "own data gone":
        (tmp_path / "moved").mkdir()
        shutil.copytree(data, tmp_path / "data")
        other = folder_run(tmp_path / "other", tmp_path / "data", "--data.image_size", "32")
        shutil.rmtree(tmp_path / "data")
        arguments, expected = [str(other), "--output", str(out)], "files to check the export with: --data"
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("partial_fc.training.cli.main.find_ranks", lambda: None)  # which looks for the other rank
        expected = "export-backbone runs in one process"
    assert expected in refused(arguments, tmp_path, capsys)


def test_a_run_whose_data_are_gone_is_exported_with_others(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    run = folder_run(tmp_path / "run", tmp_path / "data", "--data.image_size", "32")
    shutil.rmtree(tmp_path / "data")
    assert export_backbone(run, data=[data, data]).checked_on == f"12 images of {data}"


@pytest.mark.parametrize("module", ["safetensors.torch", "onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(module, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    said = refused([str(run), "--output", str(tmp_path / "out")], tmp_path, capsys)
    assert f"{module}, which is missing: pip install 'partial_fc[export]'" in said
    assert ("or export without ONNX: --formats safetensors" in said) == (module != "safetensors.torch")


def test_a_format_asks_for_its_own_packages_alone(run, tmp_path, monkeypatch):
    for module in ("onnx", "onnxscript", "onnxruntime", "onnx_ir"):
        monkeypatch.setitem(sys.modules, module, None)
    assert list(export_backbone(run, tmp_path / "a", ["safetensors"]).differences) == ["safetensors"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert list(export_backbone(run, tmp_path / "b", ["onnx"]).differences) == ["onnx"]


def test_a_run_in_half_precision_is_exported_without_a_gpu(run, tmp_path):
    run = copied(run, tmp_path)
    settings = (run / CONFIG).read_text()
    assert "mixed_precision: 'no'" in settings
    (run / CONFIG).write_text(settings.replace("mixed_precision: 'no'", "mixed_precision: fp16"))
    assert max(export_backbone(run, formats=["safetensors"]).differences["safetensors"].values()) == 0


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_a_disk_that_fails_leaves_nothing(format, run, tmp_path, capsys):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, allowed[1]))
    try:
        code = main(["export-backbone", str(run), "--output", str(tmp_path / "out"), "--formats", format])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "File too large" in said and said.count("\n") == 1
    assert tree(tmp_path) == set()


class Branch(SmallBackbone):
    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        return out if float(out.sum()) > 0 else -out


class NoSuchOperation(SmallBackbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.linalg.qr(images.flatten(1).T @ images.flatten(1))[1].sum()


class BatchOfTwo(SmallBackbone):
    """Exports, but for the batch that it was traced with."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(2, 1, 32, 32) if torch.compiler.is_exporting() else images)


class OtherWhenExported(SmallBackbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1.001 if torch.compiler.is_exporting() else 1.0)


class NotFinite(SmallBackbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


class TooWide(SmallBackbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).repeat(1, 2)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (Branch, "cannot be expressed in ONNX (opset 18): Could not guard on data-dependent expression"),
        (NoSuchOperation, "cannot be expressed in ONNX (opset 18): No ONNX function found for"),
        (BatchOfTwo, "can be exported only for batches of 2: its code fixes the number of images"),
        (
            OtherWhenExported,
            "backbone.onnx differs from the backbone in torch by 1.0e-03 of the largest coordinate on a batch of 1",
        ),
        (NotFinite, "does not give finite embeddings"),
        (TooWide, "does not give finite embeddings [n, 16]"),
    ],
)
def test_a_backbone_that_cannot_be_exported_leaves_nothing(backbone, expected, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BACKBONES, "small", backbone)
    assert expected in refused([str(run), "--output", str(tmp_path / "out")], tmp_path, capsys)


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        assert len(tree(tmp_path)) > 1, "files are there, under another name"
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "run_onnx", interrupted)
    assert main(["export-backbone", str(run), "--output", str(tmp_path / "out")]) == 130
    assert tree(tmp_path) == set()


def test_an_output_that_appears_meanwhile_is_left_alone(run, tmp_path, monkeypatch):
    describe = export.describe

    def meanwhile(*arguments: object) -> object:
        (tmp_path / "out").mkdir()
        return describe(*arguments)

    monkeypatch.setattr(export, "describe", meanwhile)
    with pytest.raises(UserError, match="already exists"):
        export_backbone(run, tmp_path / "out", ["safetensors"])
    assert tree(tmp_path) == {tmp_path / "out"}


def test_a_checkpoint_that_appears_meanwhile_is_noticed(run, tmp_path, monkeypatch):
    run = copied(run, tmp_path)
    build = BACKBONES["small"]

    def meanwhile(**sizes: object) -> nn.Module:
        (only,) = (run / "checkpoints").glob("step-*")
        shutil.copytree(only, run / "checkpoints" / "step-000099999")
        return build(**sizes)

    monkeypatch.setitem(BACKBONES, "small", meanwhile)
    with pytest.raises(UserError, match="got a new checkpoint while it was being read"):
        export_backbone(run, tmp_path / "out")


def test_the_comparison_is_relative_and_knows_what_is_no_number():
    truth = [torch.tensor([[1000.0, -2.0]])]
    assert compare([truth[0] + 0.05], truth, "x") == {1: pytest.approx(5e-5, rel=1e-2)}
    with pytest.raises(UserError, match=r"x differs .* by 2\.0e-04 .*allowed is 1e-04"):
        compare([truth[0] + 0.2], truth, "x")
    with pytest.raises(UserError, match="by nan"):
        compare([truth[0] * torch.nan], truth, "x")
    with pytest.raises(UserError, match=r"gives \[1, 1\] where the backbone gives \[1, 2\]"):
        compare([truth[0][:, :1]], truth, "x")


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "has no backbone.safetensors"),
        ("cut", "is damaged"),
        ("foreign", "has format None, this version reads 1"),
        ("newer", "has format 2, this version reads 1"),
        ("unregistered", "unknown backbone 'of nobody'"),
        ("other size", "does not match its own metadata"),
        ("no shape", "does not match its own metadata"),
    ],
)
def test_what_cannot_be_loaded_says_why(kind, expected, tmp_path):
    path = tmp_path / "backbone.safetensors"
    said = {"partial_fc_format": "1", "architecture": "small", "embedding_size": "16", "image_shape": "[1, 32, 32]"}
    state = build_backbone("small", image_shape=(1, 32, 32), embedding_size=16).state_dict()
    changes = {
        "newer": {"partial_fc_format": "2"},
        "unregistered": {"architecture": "of nobody"},
        "other size": {"embedding_size": "8"},
    }
    said |= changes.get(kind, {})
    if kind == "no shape":
        del said["image_shape"]
    if kind != "missing":
        save_file(state, path, None if kind == "foreign" else said)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=re.escape(expected)):
        load_exported_backbone(tmp_path)
