"""WebDataset: tar files ("shards") in which the members of one sample follow each other and share a name up to the first dot.

    faces-000000.tar    0001.jpg  0001.cls   0002.jpg  0002.json   ...
    picture             the member with the suffix of a picture
    label               the text of .cls, a whole number; or "label" in .json, a whole number or a string

The headers of all members, and the labels, are read once; where the pictures lie is kept in the cache until a shard's size or time changes.
From then on a picture is one read at its place. Nothing is extracted. A member that is no plain file, or whose name is absolute or leads
upwards, is left out, as is a sample without a picture or a label. A shard ends where it is cut short or a header is damaged; that there is
no end of the archive, or that something follows it, is named.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from partial_fc.training.data.dataset import EncodedIdentities, number_labels, refuse
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.formats.file_labels import NAMES, read_names
from partial_fc.training.data.formats.list_file import is_whole
from partial_fc.training.data.safe_files import LARGEST_PICTURE, Arrays, Files, Strings, cached
from partial_fc.training.errors import UserError

_LARGEST_LABEL_TEXT = 1 << 16

Found = tuple[str, int, int, "int | str"]
"""(key, offset of the picture, its bytes, label)"""


class TarIdentities(EncodedIdentities):
    """The samples of `shards` in their order. Raises UserError for a shard that is no tar file or is compressed, and if there is no
    sample; damaged samples are left out, or raise UserError, as `on_error` says."""

    def __init__(self, shards: Sequence[str | Path], image_size: int, channels: int, on_error: str = "skip") -> None:
        self.shards = [Path(shard) for shard in shards]
        try:
            made = cached("webdataset", self.shards, self._scan)
            self._files = Files(self.shards)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
        problems = list(Strings(made["problems"], made["problem_ends"]))
        refuse(problems, on_error)
        if not len(made["shard"]):
            said = f"; the first problem: {problems[0]}" if problems else ""
            raise UserError(
                f"the {len(self.shards)} tar files of {self.shards[0].parent} have no sample with a picture and a label{said}"
            )
        whole = "labels" in made
        labels, names = number_labels(
            made["labels"] if whole else list(Strings(made["label_data"], made["label_ends"]))
        )
        super().__init__(labels, names, image_size, channels)
        self.raw_labels = names if whole else ()
        if whole and int(made["labels"].min()) >= 0:
            self.identity_names = read_names(self.shards[0].parent / NAMES, names)
        self.left_out = problems
        self._shard, self._offset, self._size = made["shard"], made["offset"], made["size"]
        self._keys = Strings(made["keys"], made["key_ends"])

    def _name(self, row: int) -> str:
        return f"{self.shards[int(self._shard[row])].name}/{self._keys[row]}"

    def _encoded(self, row: int) -> bytes:
        return self._files.read(int(self._shard[row]), int(self._offset[row]), int(self._size[row]))

    def files(self) -> Iterable[tuple[str, int]]:
        for path, size in zip(self.shards, self._files.sizes, strict=True):
            yield path.name, size

    def _scan(self) -> Arrays:
        samples: list[tuple[int, Found]] = []
        problems: list[str] = []
        whole: bool | None = None
        for number, shard in enumerate(
            tqdm(self.shards, desc="indexing", unit="shard", leave=False, mininterval=1, delay=2)
        ):
            for key, offset, size, label in _samples(shard, problems):
                if whole is None:
                    whole = isinstance(label, int)
                if whole is not isinstance(label, int):
                    problems.append(
                        f"{shard.name}/{key} (the label {label!r} is {'no' if whole else 'a'} whole number, unlike the first)"
                    )
                else:
                    samples.append((number, (key, offset, size, label)))
        said, keys = Strings.of(problems), Strings.of(key for _, (key, *_) in samples)
        arrays: Arrays = {
            "shard": np.array([number for number, _ in samples], dtype=np.int32),
            "offset": np.array([offset for _, (_, offset, _, _) in samples], dtype=np.int64),
            "size": np.array([size for _, (_, _, size, _) in samples], dtype=np.int64),
            "keys": keys.data,
            "key_ends": keys.ends,
            "problems": said.data,
            "problem_ends": said.ends,
        }
        if whole:
            return {**arrays, "labels": np.array([label for _, (*_, label) in samples], dtype=np.int64)}
        texts = Strings.of(str(label) for _, (*_, label) in samples)
        return {**arrays, "label_data": texts.data, "label_ends": texts.ends}


def _samples(shard: Path, problems: list[str]) -> Iterator[Found]:
    """The whole samples of a shard; what is wrong with others is added to `problems`."""
    key: str | None = None
    fields: dict[str, Any] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in _members(archive, shard, size, problems):
                folder, _, base = member.name.rpartition("/")
                stem, _, field = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if key is not None:
                        yield from _whole_sample(shard, key, fields, problems)
                    key, fields = name, {}
                _add(archive, member, field.lower(), fields)
    except tarfile.TarError as error:
        if key is None:
            with shard.open("rb") as file:
                packed = file.read(6)
            if (
                packed[:2] == b"\x1f\x8b"
                or packed[:3] == b"BZh"
                or packed == b"\xfd7zXZ\x00"
                or packed[:4] == b"\x28\xb5\x2f\xfd"
            ):
                raise UserError(
                    f"{shard} is compressed, so that no picture can be read by itself; unpack it to a plain tar file"
                ) from error
            raise UserError(f"{shard} is no tar file ({error})") from error
        problems.append(f"{shard.name} (it is damaged or cut short after {key}: {error})")
    if key is not None:
        yield from _whole_sample(shard, key, fields, problems)


def _members(archive: tarfile.TarFile, shard: Path, size: int, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if member.isdir():
            continue
        parts = PurePosixPath(member.name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            problems.append(f"{shard.name}/{member.name} (the name leads out of the archive)")
        elif not member.isfile() or member.issparse():
            problems.append(f"{shard.name}/{member.name} (it is no plain file)")
        elif member.offset_data + member.size > size:
            problems.append(f"{shard.name}/{member.name} (the archive is cut short within it)")
        else:
            yield member
    if wrong := _wrong_end(
        shard, archive.offset
    ):  # the reader ends at a damaged header as it does at the end of the archive
        problems.append(f"{shard.name} ({wrong}; what follows is not read)")


def _wrong_end(shard: Path, offset: int) -> str | None:
    """What is wrong with the end of an archive at `offset`, in bytes; None for a block of zeros with nothing but zeros after it. The
    standard has two blocks; some writers leave one."""
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            return f"it is cut short: there is no end of the archive at byte {offset:,}"
        if any(block):
            return f"the header at byte {offset:,} is damaged"
        while rest := file.read(1 << 20):
            if rest.count(0) != len(rest):
                return (
                    f"a block of zeros at byte {offset:,} ends the archive, and more follows: the header there is damaged, or archives "
                    "were joined by `cat`, which `tar -A` does properly"
                )
    return None


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, field: str, fields: dict[str, Any]) -> None:
    """Note the member's part in its sample."""
    if field in fields.setdefault("seen", set()):
        fields.setdefault("twice", field)  # of which picture is which label?
    fields["seen"].add(field)
    if "." + field.rpartition(".")[2] in IMAGE_SUFFIXES:
        fields.setdefault("picture", (member.offset_data, member.size))
    elif field in ("cls", "json"):
        if member.size > _LARGEST_LABEL_TEXT:
            fields[field] = f"{member.size:,} bytes are too many for a label"
            return
        file = archive.extractfile(member)
        assert file is not None, "it is a plain file"
        fields[field] = file.read()


def _whole_sample(shard: Path, key: str, fields: dict[str, Any], problems: list[str]) -> Iterator[Found]:
    try:
        if "twice" in fields:
            raise ValueError(f"there are two .{fields['twice']} of this name, one after the other")
        if "picture" not in fields:
            raise ValueError("there is no picture")
        offset, size = fields["picture"]
        if size > LARGEST_PICTURE:
            raise ValueError(f"{size:,} bytes are too many for a picture")
        yield key, offset, size, _label(fields)
    except ValueError as error:
        problems.append(f"{shard.name}/{key} ({error})")


def _label(fields: dict[str, Any]) -> int | str:
    raw = fields.get("cls", fields.get("json"))
    if raw is None:
        raise ValueError("there is no label: neither .cls nor .json")
    if isinstance(raw, str):
        raise ValueError(raw)
    if "cls" in fields:
        text = raw.decode("utf-8", "replace").strip()
        if not is_whole(text):
            raise ValueError(f"the label {text[:40]!r} is no whole number")
        return int(text)
    try:
        label = json.loads(raw)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("its .json has no `label`") from None
    if (
        isinstance(label, bool)
        or not isinstance(label, int | str)
        or (isinstance(label, int) and not -(2**63) <= label < 2**63)
    ):
        raise ValueError(f"the label {str(label)[:40]!r} is no whole number and no string")
    return label
