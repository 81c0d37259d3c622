"""Data sets in every format, written by the tests themselves: with struct, tarfile and `datasets`, and nothing of
partial_fc."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MAGIC = 0xCED7230A


def picture(number: int, kind: str = "JPEG", size: int = 20, grey: bool = False) -> bytes:
    """A small picture, its own for every number."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (5, 5) if grey else (5, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def pixels(data: bytes, size: int, channels: int = 3) -> torch.Tensor:
    """What Pillow makes of it: uint8 [C, H, W]."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def samples(identities: int = 4, images: int = 3) -> list[tuple[int, bytes]]:
    """(label, picture), an identity after the other."""
    return [(label, picture(100 * label + each)) for label in range(identities) for each in range(images)]


# ---------------------------------------------------------------------------------------------------- RecordIO


def record(data: bytes, flag: int = 0) -> bytes:
    return struct.pack("<II", MAGIC, flag << 29 | len(data)) + data + b"\0" * (-len(data) % 4)


def image_data(label: float | Sequence[float], data: bytes, key: int = 0) -> bytes:
    if isinstance(label, float | int):
        return struct.pack("<IfQQ", 0, label, key, 0) + data
    return struct.pack("<IfQQ", len(label), 0, key, 0) + struct.pack(f"<{len(label)}f", *label) + data


def write_records(folder: Path, records: Sequence[tuple[int, bytes]], classes: int = 0) -> Path:
    """(key, whole record) one after the other, and their index; the .rec file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, data = [], b""
    for key, each in records:
        lines.append(f"{key}\t{len(data)}\n")
        data += each
    (folder / "train.rec").write_bytes(data)
    (folder / "train.idx").write_text("".join(lines))
    (folder / "property").write_text(f"{classes},112,112\n")
    return folder / "train.rec"


def insightface(folder: Path, content: Sequence[tuple[int, bytes]], two_labels: bool = False) -> Path:
    """A training set as InsightFace has it, of samples that are sorted by label."""
    end = len(content) + 1
    labels = [label for label, _ in content]
    present = sorted(set(labels))
    records = [(0, record(image_data((end, end + len(present)), b"")))]
    for key, (label, data) in enumerate(content, start=1):
        records.append((key, record(image_data((label, 1.0) if two_labels else label, data, key))))
    for place, label in enumerate(present):
        first = labels.index(label) + 1
        records.append((end + place, record(image_data((first, first + labels.count(label)), b"", end + place))))
    return write_records(folder, records, len(present))


# ---------------------------------------------------------------------------------------------------- shards


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, content: Sequence[tuple[int, bytes]], each: int = 5, as_json: bool = False) -> Path:
    for shard, start in enumerate(range(0, len(content), each)):
        members = []
        for number, (label, data) in enumerate(content[start : start + each], start=start):
            text = json.dumps({"label": label, "camera": 3}).encode() if as_json else str(label).encode()
            members += [(f"{number:05d}.jpg", data), (f"{number:05d}.{'json' if as_json else 'cls'}", text)]
        write_tar(folder / f"faces-{shard:03d}.tar", members)
    return folder


# ------------------------------------------------------------------------------------------------ list, folder, Parquet


def list_file(folder: Path, content: Sequence[tuple[int, bytes]]) -> Path:
    (folder / "pictures").mkdir(parents=True)
    lines = ["# faces", ""]
    for number, (label, data) in enumerate(content):
        (folder / "pictures" / f"a {number:03d}.jpg").write_bytes(data)
        lines.append(f"pictures/a {number:03d}.jpg {label}")
    (folder / "faces.txt").write_text("\n".join(lines) + "\n")
    return folder / "faces.txt"


def folder_of(folder: Path, content: Sequence[tuple[int, bytes]]) -> Path:
    for number, (label, data) in enumerate(content):
        path = folder / f"id{label:04d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def parquet(
    folder: Path, content: Sequence[tuple[int, bytes]], names: Mapping[int, str] | None = None, each: int = 7
) -> Path:
    import datasets

    (folder / "data").mkdir(parents=True)
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names.values()))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for part, start in enumerate(range(0, len(content), each)):
        some = content[start : start + each]
        table = {"image": [{"bytes": data, "path": None} for _, data in some], "label": [label for label, _ in some]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(
            str(folder / "data" / f"train-{part:05d}.parquet")
        )
    return folder


WRITERS = {
    "recordio": insightface,
    "webdataset": shards,
    "parquet": parquet,
    "list": list_file,
    "folder": folder_of,
}


def image_folder(root: Path, identities: int, images: int, damaged: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for identity in range(identities):
        (root / f"id{identity:03d}").mkdir(parents=True)
        color = rng.integers(0, 255, (1, 1, 3))
        for k in range(images):
            pixels = np.clip(color + rng.integers(-60, 60, (20, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"id{identity:03d}" / f"{k}.png")
    for k in range(damaged):
        (root / f"id{k:03d}" / "0.png").write_bytes(b"this is no picture")
    return root
