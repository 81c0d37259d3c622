"""Embeddings of encoded images are those of the evaluation, by a run and by what is exported of it."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launched import tiny_run
from PIL import Image

from partial_fc.training.backbones.digest import weights_digest
from partial_fc.training.cli.main import main
from partial_fc.training.data import FolderIdentities, UnreadableImage
from partial_fc.training.embedding import Embedder
from partial_fc.training.errors import UserError
from partial_fc.training.export.export import config_of_run, export_backbone
from partial_fc.training.results import embed_images, load_backbone
from partial_fc.training.run import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    config = tiny_run(folder, output={"folder": str(folder / "run"), "log_every": 1})
    assert main(["train", str(config)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export_backbone(run, run.parent / "exported")
    return run.parent / "exported"


def files(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run.parent / "images").rglob("*.png"))]


def by_evaluation(run: Path, flip: bool) -> np.ndarray:
    config = config_of_run(RunFolder(run))
    backbone = load_backbone(RunFolder(run), config, (3, 32, 32))
    dataset = FolderIdentities(run.parent / "images", 32, 3)
    accelerator = Accelerator(cpu=True)
    embeddings, _ = embed_images(backbone, dataset, "x", accelerator, config, RunFolder(run), flip=flip)
    return embeddings.numpy()


@pytest.mark.parametrize("flip", [False, True])
def test_embeddings_are_those_of_the_evaluation(run, exported, flip):
    wanted = by_evaluation(run, flip)
    for source in (run, exported, exported / "backbone.safetensors", exported / "backbone.onnx"):
        embedder = Embedder.open(source, flip=flip)
        found = embedder.embed(files(run))
        assert found.dtype == np.float32 and found.shape == (48, 32) and embedder.dimension == 32
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        assert embedder.preprocessing == {"image_shape": [3, 32, 32], "flip": flip}
    assert embedder.embed([]).shape == (0, 32)


def test_the_digest_names_the_weights_and_not_the_place(run, exported, tmp_path):
    digests = {
        Embedder.open(source, runtime=runtime).digest
        for source, runtime in ((run, "auto"), (exported, "torch"), (exported, "onnxruntime"))
    }
    assert len(digests) == 1
    state = load_backbone(RunFolder(run), config_of_run(RunFolder(run)), (3, 32, 32)).state_dict()
    assert digests == {weights_digest(state)}
    name = next(iter(state))
    state[name] = state[name].clone()
    state[name].view(-1)[0] = torch.nextafter(state[name].view(-1)[0], torch.tensor(2.0))
    assert weights_digest(state) not in digests
    assert weights_digest({"a": torch.zeros(2)}) != weights_digest({"a": torch.zeros(2, dtype=torch.int32)})
    assert weights_digest({"a": torch.zeros(2)}) != weights_digest({"b": torch.zeros(2)})
    shutil.copytree(exported, tmp_path / "older")
    spec = json.loads((tmp_path / "older" / "preprocessing.json").read_text())
    del spec["run"]["weights"]
    (tmp_path / "older" / "preprocessing.json").write_text(json.dumps(spec))
    assert Embedder.open(tmp_path / "older", runtime="onnxruntime").digest.startswith("onnx-")


def test_images_that_cannot_be_read_are_named(run):
    embedder = Embedder.open(run, max_pixels=10_000)
    huge = io.BytesIO()
    Image.new("L", (101, 100)).save(huge, "PNG")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT"
    for data, words in (
        (b"", "cannot identify"),
        (b"no picture", "cannot identify"),
        (files(run)[0][:60], "trunc"),
        (huge.getvalue(), "101 x 100 pixels are too many; the limit is 10,000"),
        (bomb, "decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "cannot identify"),
    ):
        with pytest.raises(UnreadableImage) as error:
            embedder.embed([files(run)[0], data], names=["good", "bad"])
        assert error.value.path == "bad" and words.lower() in error.value.reason.lower()
    with pytest.raises(UnreadableImage, match="image 0"):
        embedder.embed([b"x"])


def test_embeddings_that_are_not_finite_are_refused(run):
    embedder = Embedder.open(run)
    with torch.no_grad():
        next(embedder._forward.parameters()).fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="are not finite"):
        embedder.embed(files(run)[:2])


def test_what_is_no_backbone_is_refused(run, exported, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(exported, tmp_path / "cut")
    (tmp_path / "cut" / "backbone.onnx").write_bytes((exported / "backbone.onnx").read_bytes()[:500])
    shutil.copytree(exported, tmp_path / "alone")
    (tmp_path / "alone" / "preprocessing.json").unlink()
    shutil.copytree(exported, tmp_path / "other")
    spec = json.loads((exported / "preprocessing.json").read_text())
    (tmp_path / "other" / "preprocessing.json").write_text(json.dumps(spec | {"divide_by": 255}))
    shutil.copytree(exported, tmp_path / "odd")
    (tmp_path / "odd" / "preprocessing.json").write_text(json.dumps(spec | {"embedding_size": "many"}))
    for source, options, words in (
        (tmp_path / "nowhere", {}, "does not exist"),
        (tmp_path / "file.txt", {}, "is no backbone"),
        (tmp_path / "empty", {}, "is neither a run .* nor an exported backbone"),
        (run, {"runtime": "onnxruntime"}, "is a run, which torch runs; export it first"),
        (run, {"checkpoint": "77"}, "there is no checkpoint '77'"),
        (exported, {"checkpoint": "best"}, "has no checkpoints"),
        (exported / "backbone.onnx", {"runtime": "torch"}, "is not run by torch"),
        (tmp_path / "cut", {"runtime": "onnxruntime"}, "cannot be run"),
        (tmp_path / "alone", {"runtime": "onnxruntime"}, "preprocessing.json is missing"),
        (tmp_path / "other", {"runtime": "onnxruntime"}, "asks for pixels in another range"),
        (tmp_path / "odd", {"runtime": "onnxruntime"}, "preprocessing.json is damaged"),
    ):
        with pytest.raises(UserError, match=words):
            Embedder.open(source, **options)


def test_onnxruntime_is_asked_for_by_name_where_it_is_missing(exported, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'partial_fc\[export\]'"):
        Embedder.open(exported, runtime="onnxruntime")
    assert Embedder.open(exported).dimension == 32
