"""Every reader of files that is ours, as a function of one file's bytes: for hostile files.

    Reader.prepare(folder)           valid files, by this project's own writers (or as the format's owner writes them)
    Reader.file                      the one of them that is hostile; the others stay valid
    Reader.read(folder)              what the application does with it
    seeds(reader, folder)            valid contents of that file, to begin with

A reader may return, or raise ValueError, OSError or UserError, whose text names the file or its folder.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_files
import numpy as np
import torch
from PIL import Image

from partial_fc import (
    Checkpointer,
    HostRows,
    MarginSchedule,
    PartialFC,
    Progress,
    RandomState,
    RankFiles,
    RowOptimizer,
    import_weights,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.checkpoint.manifest import read_manifest as read_checkpoint_manifest
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.checkpoint.save_load import stored_tensors
from partial_fc.training.backbones.weights import read_weights
from partial_fc.training.cli.protocols import read_embeddings
from partial_fc.training.config import add_config, to_config
from partial_fc.training.data import decode_picture
from partial_fc.training.data.convert import _read_state, is_finished
from partial_fc.training.data.dataset import UnreadableImage
from partial_fc.training.data.formats.folder import FolderIdentities
from partial_fc.training.data.formats.list_file import ListIdentities
from partial_fc.training.data.formats.packed import packed_splits
from partial_fc.training.data.formats.packed import write_index as write_packed_index
from partial_fc.training.data.formats.parquet import ParquetIdentities
from partial_fc.training.data.formats.recordio import RecordIdentities
from partial_fc.training.data.formats.tar_files import TarIdentities
from partial_fc.training.embedding import read_spec
from partial_fc.training.embedding_files import Embedded, EmbeddingFiles, write_index, write_part
from partial_fc.training.export.export import load_exported_backbone
from partial_fc.training.gallery import Gallery
from partial_fc.training.protocols import templates
from partial_fc.training.protocols.verification_bin import read_pair_images
from partial_fc.training.report.compare import read_run
from partial_fc.training.report.hardest import read_pictures
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.serve.duplicates import read_pairs as read_duplicates
from partial_fc.training.serve.uploads import Limits, Refused, check_image, thumbnail_of
from partial_fc.training.settings_parser import SettingsParser
from partial_fc.weights.safetensors_file import SafetensorsRows, read_header

Image.init()  # Pillow looks for packages of rare formats once
D, C = 4, 7
PARTS = "c/step-000000011"
SHAPE = (3, 8, 8)
FINGERPRINT = {
    "images": 3, "identities": 2, "image_shape": [3, 8, 8], "listed": {"a": 2}, "names": "n", "labels": "l", "digest": "d",
    "pictures": "p",
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    prepare: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]
    # makes what else the folder says of the file agree with it, where it is checked before the file is read
    agree: Callable[[Path], None] = lambda folder: None
    others: tuple[Callable[[Path], None], ...] = ()  # other valid contents of the file
    reads_elsewhere: bool = False  # a list may name images by absolute paths
    names: bool = True  # whether refusals name the file; an image's are worded by who decodes it


def images_of(data: Any) -> None:
    """The first images of a data set, as a loader takes them."""
    list(data.files())
    for index in range(min(4, len(data))):
        data.name_of(index)
        with contextlib.suppress(UnreadableImage):
            data.load(index)


# ---------------------------------------------------------------------------------------------------- data sets


def small(identities: int = 2, images: int = 2) -> list[tuple[int, bytes]]:
    return [(label, data_files.picture(10 * label + i, size=8)) for label in range(identities) for i in range(images)]


def recordio(folder: Path) -> None:
    data_files.insightface(folder, small())


def recordio_plain(folder: Path) -> None:
    """Without identity records: labels are read from each image's."""
    whole = [(key, data_files.record(data_files.image_data(y, x, key))) for key, (y, x) in enumerate(small())]
    data_files.write_records(folder, whole, 2)


def recordio_parts(folder: Path) -> None:
    """A record in two parts."""
    data = data_files.image_data(0.0, small()[0][1], 1)
    parts = data_files.record(data[:40], 1) + data_files.record(data[40:], 3)
    data_files.write_records(folder, [(1, parts)], 1)


def tar(folder: Path) -> None:
    data_files.shards(folder, small())


def tar_json(folder: Path) -> None:
    data_files.shards(folder, small(), as_json=True)


def listed(name: str, lines: Callable[[str, int], str]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        data_files.list_file(folder, small())
        texts = [lines(f"pictures/a {number:03d}.jpg", label) for number, (label, _) in enumerate(small())]
        (folder / name).write_text("\n".join(texts) + "\n")

    return prepare


def named_list(folder: Path) -> None:
    listed("faces.txt", "{} {}".format)(folder)
    (folder / "names.json").write_text('["Ann", "Bob"]')


def packed(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 255, (8, 1, 4, 4), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(8, dtype=np.int32) // 2)
    np.save(folder / "sources.npy", np.arange(8, dtype=np.int32) % 2)
    held = {"identities": [3], "sources": [1]}
    write_packed_index(folder, ["a", "b", "c", "d"], ["x", "y"], held, {"by": "hand"})


def read_packed(folder: Path) -> None:
    for split in packed_splits(folder).values():
        images_of(split)


def parquet(folder: Path) -> None:
    data_files.parquet(folder, small())


def pictured(kind: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "a").mkdir(parents=True, exist_ok=True)
        (folder / "a" / "0").write_bytes(data_files.picture(3, kind, size=12))

    return prepare


def read_picture(folder: Path) -> None:
    for channels in (1, 3):
        with contextlib.suppress(UnreadableImage):
            decode_picture((folder / "a" / "0").read_bytes(), (channels, 8, 8), str(folder))


def read_upload(folder: Path) -> None:
    data = (folder / "a" / "0").read_bytes()
    with contextlib.suppress(Refused):
        check_image(data, Limits(bytes=1 << 16, pixels=1 << 16))
        assert len(thumbnail_of(data)) < 1 << 20


def image_folder(folder: Path) -> None:
    data_files.folder_of(folder, small())


# ---------------------------------------------------------------------------------------------------- protocols


def pairs(protocol: int, arrays: bool = False) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        images: list[Any] = [data for _, data in small()]
        if arrays:
            images = [np.frombuffer(data, dtype=np.uint8) for data in images]
        folder.mkdir(exist_ok=True)
        (folder / "lfw.bin").write_bytes(pickle.dumps((images, [True, np.bool_(False)]), protocol=protocol))

    return prepare


def read_pairs(folder: Path) -> None:
    images_of_pairs = read_pair_images(folder / "lfw.bin", SHAPE)
    for index in range(min(4, len(images_of_pairs))):
        with contextlib.suppress(UnreadableImage):
            images_of_pairs.load(index)


def ijb(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "face_tid_mid.txt").write_text("1.jpg 1 10\n2.jpg 1 11\n3.jpg 2 12\n")
    (folder / "template_pair_label.txt").write_text("1 2 0\n1 1 1\n")
    (folder / "name_5pts_score.txt").write_text("".join(f"{n}.jpg 1 2 3 4 5 6 7 8 9 10 0.5\n" for n in (1, 2, 3)))


def read_ijb(folder: Path) -> None:
    lines = templates.read_templates(folder / "face_tid_mid.txt")
    templates.read_pairs(folder / "template_pair_label.txt", lines.templates)
    templates.read_detector_scores(folder / "name_5pts_score.txt", lines.names)
    templates.read_points(folder / "name_5pts_score.txt", lines.names)


def rows_of_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / "rows.npy", np.ones((3, D), dtype=np.float32))


# ------------------------------------------------------------------------------------------------ checkpoints, weights


def checkpoint(folder: Path) -> None:
    head = PartialFC(D, C, seed=1)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    head(torch.ones(2, D), torch.tensor([0, 1])).backward()
    optimizer.step()
    save_checkpoint(folder / "c", head=head, head_optimizer=optimizer)


def sizes_agree(folder: Path) -> None:
    """The manifest knows the sizes of the files as they are."""
    for path in folder.glob("c/**/manifest.json"):
        manifest = json.loads(path.read_text())
        data = path.parent / manifest["data"]
        files = [file for file in data.glob("**/*") if file.is_file()]
        manifest["files"] = {str(file.relative_to(data)): file.stat().st_size for file in files}
        path.write_text(json.dumps(manifest))


def rows_and_momentum(storage: HostRows | None) -> dict[str, Any]:
    head = PartialFC(D, 40, sample_rate=0.05, seed=1, storage=storage)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    return {"head": head, "head_optimizer": optimizer}


def checkpoint_of_parts(folder: Path) -> None:
    """Rows that changed, in two parts, and steps that they have missed."""
    named = rows_and_momentum(HostRows())
    checkpointer = Checkpointer(folder / "c", keep_last=1)
    for step in range(12):
        named["head"](torch.ones(2, D), torch.tensor([step, step + 1])).backward()
        named["head_optimizer"].step()
        named["head_optimizer"].zero_grad()
        if step > 9:
            checkpointer.save(step, **named)
    checkpointer.release()


def read_checkpoint_of_parts(folder: Path) -> None:
    path = folder / "c" / "step-000000011"
    stored_tensors(path)
    load_checkpoint(path, head=rows_and_momentum(None)["head"])
    load_checkpoint(path, **rows_and_momentum(None))


def read_checkpoint(folder: Path) -> None:
    head = PartialFC(D, C)
    load_checkpoint(folder / "c", head=head)
    stored_tensors(folder / "c")


def read_metadata(folder: Path) -> None:
    manifest = read_checkpoint_manifest(folder / "c")
    SafeReader(folder / "c" / manifest["data"]).check()
    read_checkpoint(folder)


class Given:
    """What a checkpoint is to hold."""

    def __init__(self, state: Any) -> None:
        self.state_dict = lambda: state


def checkpoint_values(folder: Path) -> None:
    """The plain values of a checkpoint as JSON; `written_values` makes the checkpoint."""
    folder.mkdir(exist_ok=True)
    head = PartialFC(D, C, seed=1)
    values = {
        "head": head.state_dict()["_extra_state"], "random": RandomState().state_dict(),
        "progress": Progress(1, 2).state_dict(),
        "schedule": MarginSchedule(head, start=0.1, end=0.2, end_step=3).state_dict(),
    }  # fmt: skip
    state = values["random"]["ranks"][0]
    state["python"] = "[3, [" + "1, " * 624 + "624], null]"  # shorter
    state["torch"] = torch.Generator().get_state().numpy().tobytes().hex()
    state.pop("numpy", None)
    (folder / "values.json").write_text(json.dumps(values))
    written_values(folder)


def written_values(folder: Path) -> None:
    shutil.rmtree(folder / "c", ignore_errors=True)
    try:
        values = json.loads((folder / "values.json").read_text())
        head = {"weight": torch.zeros(C, D), "_extra_state": values["head"]}
        others = {name: Given(value) for name, value in values.items() if name != "head"}
        save_checkpoint(folder / "c", head=Given(head), **others)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shutil.rmtree(folder / "c", ignore_errors=True)  # it cannot be written, and is none


def read_values(folder: Path) -> None:
    head = PartialFC(D, C)
    schedule = MarginSchedule(head, start=0.1, end=0.2, end_step=3)
    before = head.weight.detach().clone()
    states = torch.get_rng_state(), random.getstate()
    try:
        load_checkpoint(folder / "c", head=head, random=RandomState(), progress=Progress(), schedule=schedule)
    except BaseException:
        assert torch.equal(head.weight, before), "weights are not as they were"
        raise
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])


def exported_rows(folder: Path) -> None:
    from partial_fc import export_weights

    folder.mkdir(exist_ok=True)
    export_weights(folder / "rows.safetensors", PartialFC(D, C, seed=1), overwrite=True)


def read_rows(folder: Path) -> None:
    path = folder / "rows.safetensors"
    for name in read_header(path).tensors:
        rows = SafetensorsRows(path, name)
        few = min(2, rows.shape[0])
        if rows.shape[1:].numel() * few < 1 << 20:
            assert len(rows.rows(0, few)) == few
    import_weights(path, PartialFC(D, C))


def rank_file(old: bool, name: str = "softmax_fc_gpu_0.pt") -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        content = {"weight": torch.ones(3, D), "weight_mom": torch.zeros(3, D)}
        torch.save(content, folder / "softmax_fc_gpu_0.pt", _use_new_zipfile_serialization=not old)

    return prepare


def read_rank_file(folder: Path) -> None:
    found = RankFiles(folder)
    if found.shape.numel() < 1 << 20:
        found.rows(0, found.shape[0])
        for state in found.state.values():
            state.rows(0, found.shape[0])


def backbone_file(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": {"module.fc.weight": torch.ones(2, 2)}}, folder / "backbone.pt")


def index_of_parts(folder: Path) -> None:
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    torch.save({"fc.weight": torch.ones(2, 2)}, folder / "parts" / "one.bin")
    index = {"weight_map": {"fc.weight": "one.bin"}}
    (folder / "parts" / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def exported_backbone(folder: Path) -> None:
    from safetensors.torch import save_file

    from partial_fc.training.backbones import build_backbone

    folder.mkdir(exist_ok=True)
    backbone = build_backbone("small", image_shape=(1, 16, 16), embedding_size=4)
    metadata = {"partial_fc_format": "1", "architecture": "small", "embedding_size": "4", "image_shape": "[1, 16, 16]"}
    save_file(backbone.state_dict(), folder / "backbone.safetensors", metadata=metadata)


# ---------------------------------------------------------------------------------------------------- the application


def run_folder(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(
        "head:\n  margin:\n    class_path: ArcFace\n    init_args: {scale: 32.0, margin: 0.5}\n  sample_rate: 0.5\n"
        "optimizer:\n  class_path: SGD\n  init_args: {lr: 0.1}\ntrain: {epochs: 2, batch_size: 8}\n"
        "data: {folder: null, mix: []}\nbackbone: {name: conv4, embedding_size: 8}\nseed: 3\n"
    )
    (folder / "history.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 2.5}\n{"step": 2, "loss": 1e-3}\n')
    evaluation = {"name": "seen", "accuracy": 0.5, "tar@1e-3": 0.2}
    (folder / "metrics.json").write_text(json.dumps({"evaluations": [evaluation], "seconds": 3.0}))
    (folder / "curves.json").write_text("[]")
    (folder / "pictures.json").write_text(json.dumps({"sets": {"seen": {"genuine": []}}, "confusions": []}))
    (folder / "data.json").write_text(json.dumps({"training": FINGERPRINT}))
    (folder / "duplicates.csv").write_text(
        "class_a,identity_a,images_a,class_b,identity_b,images_b,row_cosine,mean_cosine\n1,x,3,2,y,4,0.9,\n"
    )


def read_history(folder: Path) -> None:
    run = RunFolder(folder)
    run.history(up_to_step=1)
    run.history()
    run.rewind_history(1)


def read_run_folder(folder: Path) -> None:
    read_run(str(folder), "a")


def read_settings(folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        to_config(settings_parser(), ["--config", str(folder / CONFIG)])


@functools.cache
def settings_parser() -> SettingsParser:
    """Making one takes much longer than to parse with it."""
    parser = SettingsParser(exit_on_error=False)
    add_config(parser)
    return parser


def conversion(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    state = {"format": "webdataset", "source": FINGERPRINT, "finished": {"images": 3}}
    (folder / ".convert.json").write_text(json.dumps(state))


def read_conversion(folder: Path) -> None:
    is_finished(folder)
    _read_state(folder, {"format": "webdataset", "source": FINGERPRINT})


def read_fingerprint(folder: Path) -> None:
    RunFolder(folder).check_data({"training": FINGERPRINT})


def gallery(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 8)).astype(np.float32)
    built = Gallery.build(folder / "g", rows, [f"id{n // 2}" for n in range(8)], backbone="b" * 32, index="codes")
    built.remove(["id3"])


def gallery_agrees(folder: Path) -> None:
    path = folder / "g" / "gallery.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["segments"]:
        entry["size"] = (folder / "g" / entry["name"]).stat().st_size
    path.write_text(json.dumps(manifest))


def read_gallery(folder: Path) -> None:
    held = Gallery.open(folder / "g")
    queries = np.eye(8, dtype=np.float32)[:2]
    if queries.shape[1] == held.manifest.dimension:
        held.search(queries, 2)


def embedded(kind: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        rows = Embedded(
            np.arange(3), np.arange(3), ["a", "b", "c"], ["x", "y", "z"], np.ones(3, np.float32),
            rng.standard_normal((3, D)).astype(np.float32),
        )  # fmt: skip
        write_part(folder / f"part-000000.{kind}", rows, {"job": {"backbone": "b", "preprocessing": {}}})
        write_index(
            folder,
            {
                "format": "partial_fc embeddings, 1", "files": kind, "part": 3, "dimension": D, "backbone": "b",
                "preprocessing": {}, "source": None, "finished": {"parts": 1},
            },
        )  # fmt: skip

    return prepare


def read_embedded(folder: Path) -> None:
    for _ in EmbeddingFiles.open(folder).parts():
        pass


def read_part(kind: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for _ in EmbeddingFiles.open(folder / f"part-000000.{kind}").parts():
            pass

    return read


def export_spec(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    spec = {
        "input": {"shape": ["n", 3, 8, 8]}, "embedding_size": 4, "run": {"step": 3}, "divide_by": 127.5,
        "then_subtract": 1.0, "layout": "NCHW",
    }  # fmt: skip
    (folder / "preprocessing.json").write_text(json.dumps(spec))


def on_rec(folder: Path) -> RecordIdentities:
    return RecordIdentities(folder / "train.rec", 8, 3)


def on_list(name: str) -> Callable[[Path], None]:
    return lambda folder: images_of(ListIdentities(folder / name, 8, 3))


READERS: dict[str, Reader] = {
    "recordio": Reader(recordio, "train.rec", lambda f: images_of(on_rec(f))),
    "recordio-plain": Reader(recordio_plain, "train.rec", lambda f: images_of(on_rec(f))),
    "recordio-parts": Reader(recordio_parts, "train.rec", lambda f: images_of(on_rec(f))),
    "recordio-index": Reader(recordio, "train.idx", lambda f: images_of(on_rec(f))),
    "recordio-property": Reader(recordio, "property", lambda f: on_rec(f)),
    "tar": Reader(
        tar, "faces-000.tar", lambda f: images_of(TarIdentities([f / "faces-000.tar"], 8, 3)), others=(tar_json,)
    ),
    "list-txt": Reader(named_list, "faces.txt", on_list("faces.txt"), reads_elsewhere=True),
    "list-csv": Reader(listed("faces.csv", "{},{}".format), "faces.csv", on_list("faces.csv"), reads_elsewhere=True),
    "list-tsv": Reader(listed("faces.tsv", "{}\t{}".format), "faces.tsv", on_list("faces.tsv"), reads_elsewhere=True),
    "list-lst": Reader(listed("faces.lst", lambda p, y: f"7\t{y}.000\t{p}"), "faces.lst", on_list("faces.lst"), reads_elsewhere=True),
    "names": Reader(named_list, "names.json", on_list("faces.txt")),
    "packed-index": Reader(packed, "packed.json", read_packed),
    "packed-images": Reader(packed, "images.npy", read_packed),
    "packed-labels": Reader(packed, "labels.npy", read_packed),
    "parquet": Reader(
        parquet, "data/train-00000.parquet",
        lambda f: images_of(ParquetIdentities([f / "data" / "train-00000.parquet"], 8, 3)),
    ),
    "folder": Reader(
        image_folder, "id0000/00000.jpg", lambda f: images_of(FolderIdentities(f, 8, 3)), others=()
    ),
    "picture": Reader(
        pictured("JPEG"), "a/0", read_picture, others=tuple(map(pictured, ("PNG", "BMP", "WEBP", "GIF", "TIFF")))
    ),
    "upload": Reader(pictured("JPEG"), "a/0", read_upload, others=tuple(map(pictured, ("PNG", "WEBP")))),
    "pairs": Reader(
        pairs(4), "lfw.bin", read_pairs, others=(pairs(0), pairs(2), pairs(5), pairs(2, True), pairs(4, True))
    ),
    "templates": Reader(ijb, "face_tid_mid.txt", read_ijb),
    "template-pairs": Reader(ijb, "template_pair_label.txt", read_ijb),
    "detections": Reader(ijb, "name_5pts_score.txt", read_ijb),
    "rows-of-images": Reader(rows_of_images, "rows.npy", lambda f: read_embeddings(f / "rows.npy")),
    "checkpoint-manifest": Reader(checkpoint, "c/manifest.json", read_checkpoint),
    "checkpoint-metadata": Reader(checkpoint, "c/data-0001/.metadata", read_metadata, sizes_agree),
    "checkpoint-values": Reader(checkpoint_values, "values.json", read_values, written_values),
    "checkpoint-data": Reader(checkpoint, "c/data-0001/__0_0.distcp", read_checkpoint, sizes_agree),
    "parts-manifest": Reader(checkpoint_of_parts, f"{PARTS}/manifest.json", read_checkpoint_of_parts),
    "parts-metadata": Reader(
        checkpoint_of_parts, f"{PARTS}/data-0001/part-0000/.metadata", read_checkpoint_of_parts, sizes_agree
    ),
    "parts-data": Reader(checkpoint_of_parts, f"{PARTS}/data-0001/__0_0.distcp", read_checkpoint_of_parts, sizes_agree),
    "safetensors": Reader(exported_rows, "rows.safetensors", read_rows),
    "rank-file": Reader(
        rank_file(False), "softmax_fc_gpu_0.pt", read_rank_file, others=(rank_file(True),)
    ),
    "backbone-file": Reader(backbone_file, "backbone.pt", lambda f: read_weights(f / "backbone.pt")),
    "backbone-index": Reader(
        index_of_parts, "parts/pytorch_model.bin.index.json", lambda f: read_weights(f / "parts")
    ),
    "exported-backbone": Reader(exported_backbone, "backbone.safetensors", load_exported_backbone),
    "export-description": Reader(export_spec, "preprocessing.json", lambda f: read_spec(f / "preprocessing.json")),
    "settings": Reader(run_folder, CONFIG, read_settings, names=False),  # or the setting
    "run-settings": Reader(run_folder, CONFIG, read_run_folder),
    "history": Reader(run_folder, "history.jsonl", read_history),
    "run-history": Reader(run_folder, "history.jsonl", read_run_folder),
    "run-metrics": Reader(run_folder, "metrics.json", read_run_folder),
    "run-curves": Reader(run_folder, "curves.json", read_run_folder),
    "duplicates": Reader(run_folder, "duplicates.csv", lambda f: read_duplicates(f / "duplicates.csv")),
    "conversion": Reader(conversion, ".convert.json", read_conversion),
    "run-data": Reader(run_folder, "data.json", read_fingerprint),
    "run-pictures": Reader(run_folder, "pictures.json", read_pictures),
    "gallery": Reader(gallery, "g/gallery.json", read_gallery),
    "gallery-segment": Reader(gallery, "g/segment-*.arrow", read_gallery, gallery_agrees),
    "gallery-removed": Reader(gallery, "g/removed-*.npy", read_gallery),
    "gallery-codes": Reader(gallery, "g/codes-*.npz", read_gallery),
    "embeddings-index": Reader(embedded("npz"), "embeddings.json", read_embedded),
    "embeddings-npz": Reader(embedded("npz"), "part-000000.npz", read_part("npz")),
    "embeddings-parquet": Reader(embedded("parquet"), "part-000000.parquet", read_part("parquet")),
}  # fmt: skip


def file_of(reader: Reader, folder: Path) -> Path:
    """The hostile file of a prepared folder."""
    (found,) = folder.glob(reader.file)
    return found


def seeds(reader: Reader, folder: Path) -> list[bytes]:
    """Valid contents of the file, the first as `prepare` leaves it in `folder / "here"`."""
    found = []
    for number, prepare in enumerate((*reader.others, reader.prepare)):
        place = folder / (f"other-{number}" if number < len(reader.others) else "here")
        place.mkdir(parents=True)
        prepare(place)
        found.append(file_of(reader, place).read_bytes())
    return found[::-1]
