"""WebDataset: tar files in which the members of one sample follow each other and share their name up to the first dot.

    faces-000000.tar    0001.jpg  0001.cls   0002.jpg  0002.json   ...
    image               the member with the suffix of an image
    label               the text of .cls, an integer; or "label" in .json, an integer or a string

The headers of all members, and the labels, are read once; offsets and labels are cached until the size or time of a tar
file changes. After that, loading an image is one read at its offset. Nothing is extracted.

Skipped and reported: members that are not regular files or whose name is absolute or contains `..`, and samples without
an image or a label. A tar file is read up to a damaged header, or to where it is cut short; a file without an
end-of-archive marker, or with data after it, is reported.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from partial_fc.training.data.dataset import EncodedIdentities, raise_if_skipped
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.formats.file_labels import NAMES, is_integer, number_labels, read_names
from partial_fc.training.data.index_cache import Arrays, Strings, cached
from partial_fc.training.data.safe_files import MAX_IMAGE_BYTES, LargeFiles
from partial_fc.training.errors import UserError
from partial_fc.training.files import naming

_MAX_LABEL_BYTES = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

Sample = tuple[str, int, int, "int | str"]
"""(key, offset of the image, its size in bytes, label)"""


class TarIdentities(EncodedIdentities):
    """The samples of the tar files `paths`, in their order.

    Raises UserError for a file that is not a tar file or is compressed, and if there is no sample. Damaged samples are
    skipped and named in `skipped`, or raise UserError, as `on_error` says.
    """

    def __init__(self, paths: Sequence[str | Path], image_size: int, channels: int, on_error: str = "skip") -> None:
        self.paths = [Path(path) for path in paths]
        try:
            index = cached("webdataset", self.paths, self._build_index)
            self._files = LargeFiles(self.paths)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
        skipped = list(Strings(index["problems"], index["problem_ends"]))
        raise_if_skipped(skipped, on_error)
        if not len(index["shard"]):
            first = f"; the first problem: {skipped[0]}" if skipped else ""
            raise UserError(
                f"the {len(self.paths)} tar files of {self.paths[0].parent} have no sample with an image and a label"
                f"{first}"
            )
        integers = "labels" in index
        labels, names = number_labels(
            index["labels"] if integers else list(Strings(index["label_data"], index["label_ends"]))
        )
        super().__init__(labels, names, image_size, channels)
        self.raw_labels = names if integers else ()
        if integers and int(index["labels"].min()) >= 0:
            self.identity_names = read_names(self.paths[0].parent / NAMES, names)
        self.skipped = skipped
        self._file = index["shard"]
        self._offset = index["offset"]
        self._size = index["size"]
        self._keys = Strings(index["keys"], index["key_ends"])

    def name_at(self, position: int) -> str:
        return f"{self.paths[int(self._file[position])].name}/{self._keys[position]}"

    def encoded_at(self, position: int) -> bytes:
        return self._files.read(int(self._file[position]), int(self._offset[position]), int(self._size[position]))

    def files(self) -> Iterable[tuple[str, int]]:
        for path, size in zip(self.paths, self._files.sizes, strict=True):
            yield path.name, size

    def _build_index(self) -> Arrays:
        """Read all headers and labels; return the arrays that are cached."""
        samples: list[tuple[int, Sample]] = []
        problems: list[str] = []
        integers: bool | None = None  # whether the first label is an integer; all others must be of the same kind
        bar = tqdm(self.paths, desc="indexing", unit="file", leave=False, mininterval=1, delay=2)
        for number, path in enumerate(bar):
            for key, offset, size, label in _samples(path, problems):
                if integers is None:
                    integers = isinstance(label, int)
                if integers is isinstance(label, int):
                    samples.append((number, (key, offset, size, label)))
                else:
                    kind = "not an integer" if integers else "an integer"
                    problems.append(f"{path.name}/{key} (the label {label!r} is {kind}, unlike the first)")
        keys = Strings.of(key for _, (key, *_) in samples)
        texts = Strings.of(problems)
        arrays: Arrays = {
            "shard": np.array([number for number, _ in samples], dtype=np.int32),
            "offset": np.array([offset for _, (_, offset, _, _) in samples], dtype=np.int64),
            "size": np.array([size for _, (_, _, size, _) in samples], dtype=np.int64),
            "keys": keys.data,
            "key_ends": keys.ends,
            "problems": texts.data,
            "problem_ends": texts.ends,
        }
        if integers:
            return {**arrays, "labels": np.array([label for _, (*_, label) in samples], dtype=np.int64)}
        labels = Strings.of(str(label) for _, (*_, label) in samples)
        return {**arrays, "label_data": labels.data, "label_ends": labels.ends}


def _samples(path: Path, problems: list[str]) -> Iterator[Sample]:
    """Yield the complete samples of a tar file; add a line to `problems` for everything else that is wrong."""
    key: str | None = None
    fields: dict[str, Any] = {}
    size = path.stat().st_size
    try:
        with naming(path), tarfile.open(path, "r:") as archive:
            for member in _members(archive, path, size, problems):
                folder, _, base = member.name.rpartition("/")
                stem, _, field = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if key is not None:
                        yield from _complete_sample(path, key, fields, problems)
                    key = name
                    fields = {}
                _add_member(archive, member, field.lower(), fields)
    except tarfile.TarError as error:
        if key is None:
            with naming(path), path.open("rb") as file:
                start = file.read(6)
            if start.startswith(_COMPRESSED):
                raise UserError(
                    f"{path} is compressed, so single images cannot be read from it; decompress it to a plain tar file"
                ) from error
            raise UserError(f"{path} is not a tar file ({error})") from error
        problems.append(f"{path.name} (it is damaged or cut short after {key}: {error})")
    if key is not None:
        yield from _complete_sample(path, key, fields, problems)


def _members(archive: tarfile.TarFile, path: Path, size: int, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are safe to read, and check how the archive ends."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # the archive would keep all of them in memory
        if member.isdir():
            continue
        parts = PurePosixPath(member.name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            problems.append(f"{path.name}/{member.name} (the name points outside the archive)")
        elif not member.isfile() or member.issparse():
            problems.append(f"{path.name}/{member.name} (it is not a regular file)")
        elif member.offset_data + member.size > size:
            problems.append(f"{path.name}/{member.name} (the archive is cut short within it)")
        else:
            yield member
    # tarfile stops at a damaged header without an error, as it does at the end of the archive.
    if wrong := _wrong_end(path, archive.offset):
        problems.append(f"{path.name} ({wrong}; what follows is not read)")


def _wrong_end(path: Path, offset: int) -> str | None:
    """Describe what is wrong with the end of the archive at byte `offset`; None if only zeros follow.

    The standard has two blocks of zeros at the end; some writers write one, which is accepted.
    """
    with naming(path), path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            return f"it is cut short: there is no end-of-archive marker at byte {offset:,}"
        if any(block):
            return f"the header at byte {offset:,} is damaged"
        while rest := file.read(1 << 20):
            if rest.count(0) != len(rest):
                return (
                    f"a block of zeros at byte {offset:,} ends the archive, but data follow: the header there is "
                    "damaged, or archives were joined by `cat`; join them with `tar -A`"
                )
    return None


def _add_member(archive: tarfile.TarFile, member: tarfile.TarInfo, field: str, fields: dict[str, Any]) -> None:
    """Add a member of a sample to its `fields`.

    "image": (offset, size); "cls", "json": bytes, or a str that says why they were not read; "duplicate": a suffix that
    two members have, so that it is unclear which label belongs to which image; "seen": all suffixes.
    """
    if field in fields.setdefault("seen", set()):
        fields.setdefault("duplicate", field)
    fields["seen"].add(field)
    if "." + field.rpartition(".")[2] in IMAGE_SUFFIXES:
        fields.setdefault("image", (member.offset_data, member.size))
    elif field in ("cls", "json"):
        if member.size > _MAX_LABEL_BYTES:
            fields[field] = f"{member.size:,} bytes are too many for a label"
            return
        file = archive.extractfile(member)
        assert file is not None, "it is a regular file"
        fields[field] = file.read()


def _complete_sample(path: Path, key: str, fields: dict[str, Any], problems: list[str]) -> Iterator[Sample]:
    """Yield the sample of these fields if it is complete, else add a line to `problems`."""
    try:
        if "duplicate" in fields:
            raise ValueError(f"two .{fields['duplicate']} members have this name, one after the other")
        if "image" not in fields:
            raise ValueError("there is no image")
        offset, size = fields["image"]
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size:,} bytes are too many for an image; the limit is {MAX_IMAGE_BYTES:,}")
        yield key, offset, size, _label(fields)
    except ValueError as error:
        problems.append(f"{path.name}/{key} ({error})")


def _label(fields: dict[str, Any]) -> int | str:
    raw = fields.get("cls", fields.get("json"))
    if raw is None:
        raise ValueError("there is no label: neither .cls nor .json")
    if isinstance(raw, str):
        raise ValueError(raw)
    if "cls" in fields:
        text = raw.decode("utf-8", "replace").strip()
        if not is_integer(text):
            raise ValueError(f"the label {text[:40]!r} is not an integer")
        return int(text)
    try:
        label = json.loads(raw)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("its .json has no `label`") from None
    if isinstance(label, str):
        return label
    if not isinstance(label, int) or isinstance(label, bool) or not -(2**63) <= label < 2**63:
        raise ValueError(f"the label {str(label)[:40]!r} is neither an integer of 64 bits nor a string")
    return label
