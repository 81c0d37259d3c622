"""Files of embeddings: the folder that `partial-fc embed` writes, and reading it or a single file.

    DIR/embeddings.json       what was embedded by what; at the end, that it is finished
    DIR/part-000000.parquet   the images [0, part) of the data set, part-000001 the next, ...; or .npz
    DIR/unreadable.txt        images that could not be read, if any

A part has a row for each image that could be read:

    id          int64         position of the image in the data set
    label       int64         label of its identity there
    identity    string        name of its identity
    path        string        name of the image, as the data set has it
    norm        float32       length of the embedding
    embedding   float32 [D]   as the backbone gives it, not of unit length

and, as metadata, which images it covers, those that were unreadable, and a digest of the job. A part appears under its
name when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from partial_fc.training.errors import UserError
from partial_fc.training.files import on_disk, told, write_atomically

INDEX = "embeddings.json"
UNREADABLE = "unreadable.txt"
FORMAT = "partial_fc embeddings, 1"
ENDINGS = {"parquet": ".parquet", "npz": ".npz"}
READ_AT_ONCE = 16_384  # rows
ABOUT = "partial_fc"  # key of the metadata in a Parquet file; "about" in npz

FileKind = Literal["parquet", "npz"]


@dataclass
class Embedded:
    """Some rows: columns of n images, with embeddings float32 `[n, D]`."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    identities: list[str]
    paths: list[str]
    norms: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


def valid_text(name: str) -> str:
    """Return a name as valid Unicode: bytes of file names that are none are written as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def arrow() -> Any:
    """Return pyarrow. UserError that says what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"Parquet files need the package {error.name}: pip install 'partial_fc[gallery]', or use --files npz"
        ) from error
    return pyarrow


def job_digest(job: Mapping[str, Any]) -> str:
    """Return a digest of what is embedded by what, so that parts of another job are known."""
    return hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=16).hexdigest()


def part_path(folder: Path, number: int, kind: FileKind) -> Path:
    return folder / f"part-{number:06d}{ENDINGS[kind]}"


def write_part(path: Path, rows: Embedded, about: Mapping[str, Any]) -> None:
    """Write a part, in one move: after this it is on the disk. about: its metadata. OSError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with on_disk(temporary) as file:
            if path.suffix == ".npz":
                _write_npz(file, rows, about)
            else:
                _write_parquet(file, rows, about)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _write_npz(file: Any, rows: Embedded, about: Mapping[str, Any]) -> None:
    np.savez(
        file,
        allow_pickle=False,
        id=rows.ids,
        label=rows.labels,
        identity=np.array(rows.identities, dtype=np.str_),
        path=np.array(rows.paths, dtype=np.str_),
        norm=rows.norms,
        embedding=rows.embeddings,
        about=np.array(json.dumps(about)),
    )


def _write_parquet(file: Any, rows: Embedded, about: Mapping[str, Any]) -> None:
    pa = arrow()
    dimension = rows.embeddings.shape[1]
    values = pa.array(np.ascontiguousarray(rows.embeddings).ravel(), pa.float32())
    table = pa.table(
        {
            "id": pa.array(rows.ids, pa.int64()),
            "label": pa.array(rows.labels, pa.int64()),
            "identity": pa.array(rows.identities, pa.string()),
            "path": pa.array(rows.paths, pa.string()),
            "norm": pa.array(rows.norms, pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, dimension),
        }
    ).replace_schema_metadata({ABOUT: json.dumps(about)})
    pa.parquet.write_table(table, file, compression="none", use_dictionary=["identity"])


def read_about(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a part; None if the file is missing, damaged, or has none. UserError if the disk cannot
    read it."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(json.loads(str(arrays["about"])))
        with path.open("rb") as file:  # what Arrow says of a file that it opened itself is without the system's error
            metadata = arrow().parquet.read_schema(file).metadata or {}
        return dict(json.loads(metadata[ABOUT.encode()]))
    except UserError:
        raise
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno is None:  # a reader's word for a damaged file
            return None
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception:  # readers raise almost anything for a damaged file
        return None


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class EmbeddingFiles:
    """Embeddings in files: a folder of `partial-fc embed`, or one .parquet or .npz file with the columns of a part.

    A file needs `embedding` and `identity`; other columns may be missing.
    """

    path: Path
    files: list[Path]
    dimension: int
    backbone: str | None
    """The digest of the backbone's weights; None if the files do not say."""
    preprocessing: dict[str, Any]
    source: str | None
    """Where the backbone was."""

    @classmethod
    def open(cls, path: str | Path) -> EmbeddingFiles:
        """Open embeddings. UserError if they are missing, damaged or unfinished."""
        path = Path(path)
        if path.is_file() and path.suffix in ENDINGS.values():
            about = read_about(path) or {}
            first = next(_read(path), None)
            if first is None:
                raise UserError(f"{path} has no embeddings")
            job = about.get("job", {})
            return cls(
                path,
                [path],
                first.embeddings.shape[1],
                job.get("backbone"),
                job.get("preprocessing", {}),
                job.get("source"),
            )
        index = read_index(path)
        if "finished" not in index:
            raise UserError(
                f"the embeddings in {path} are unfinished; run the same `partial-fc embed` again, which goes on"
            )
        files = []
        for number in range(index["finished"]["parts"]):  # which may be any number
            files.append(part_path(path, number, index["files"]))
            if not files[-1].is_file():
                raise UserError(f"{files[-1]} is missing; run the same `partial-fc embed` again, which makes it")
        return cls(path, files, index["dimension"], index["backbone"], index["preprocessing"], index.get("source"))

    def parts(self) -> Iterator[Embedded]:
        """Yield all rows, up to READ_AT_ONCE at a time. UserError for a file that is damaged."""
        for file in self.files:
            for rows in _read(file):
                if rows.embeddings.shape[1] != self.dimension:
                    raise UserError(
                        f"{file} has embeddings of {rows.embeddings.shape[1]} numbers, but others have {self.dimension}"
                    )
                yield rows


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of embeddings.json; UserError if it is missing, damaged, or of another version."""
    path = folder / INDEX
    missing = f"{folder} has no embeddings (no {INDEX}); make them: partial-fc embed RUN --data ..."
    with told(path, again="remove the folder, embed again", missing=missing):
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path} has the format {index['format']!r}; this version reads {FORMAT!r}: embed again")
        if index["files"] not in ENDINGS or type(index["part"]) is not int or type(index["dimension"]) is not int:
            raise ValueError("it does not describe embeddings")
        if index["part"] < 1 or index["dimension"] < 1:
            raise ValueError("it counts less than one image, or number")
        if "finished" in index and type(index["finished"]["parts"]) is not int:
            raise ValueError("it does not say how many parts there are")
        if not isinstance(index["preprocessing"], dict) or not isinstance(index["backbone"], str):
            raise ValueError("it does not name the backbone")
    return index


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replace embeddings.json."""
    write_atomically(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _read(path: Path) -> Iterator[Embedded]:
    try:
        yield from _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{path} has no column {str(error).strip(chr(39))}; embeddings need embedding and identity"
        ) from error
    except Exception as error:  # readers raise almost anything for a damaged file
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _read_npz(path: Path) -> Iterator[Embedded]:
    with np.load(path, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    yield from _in_blocks({name: column for name, column in columns.items() if column.ndim})


def _in_blocks(columns: Mapping[str, npt.NDArray[Any]]) -> Iterator[Embedded]:
    for start in range(0, len(columns["embedding"]), READ_AT_ONCE):
        here = slice(start, start + READ_AT_ONCE)
        some = {name: column[here] for name, column in columns.items()}
        for name in ("identity", "path"):
            if name in some:
                some[name] = some[name].tolist()
        yield _embedded(some, start)


def _read_parquet(path: Path) -> Iterator[Embedded]:
    with path.open("rb") as file:
        yield from _parquet_rows(arrow().parquet.ParquetFile(file))


def _parquet_rows(file: Any) -> Iterator[Embedded]:
    start = 0
    for batch in file.iter_batches(READ_AT_ONCE):
        names = batch.schema.names
        columns: dict[str, Any] = {}
        for name in ("id", "label", "norm"):
            if name in names:
                columns[name] = batch.column(name).to_numpy(zero_copy_only=False)
        for name in ("identity", "path"):
            if name in names:
                columns[name] = batch.column(name).to_pylist()
        if "embedding" not in names:
            raise KeyError("embedding")
        column = batch.column("embedding")
        if column.null_count:
            raise ValueError("an embedding is missing")
        values = column.flatten().to_numpy(zero_copy_only=False)
        if len(values) % max(1, len(column)):
            raise ValueError("its embeddings have different widths")
        columns["embedding"] = values.reshape(len(column), -1)
        yield _embedded(columns, start)
        start += len(batch)


def _embedded(columns: Mapping[str, Any], start: int) -> Embedded:
    """Return the rows of some columns; raise KeyError or ValueError for those that are missing or do not match."""
    embeddings = np.asarray(columns["embedding"])
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise ValueError(f"its embeddings are {embeddings.dtype} of shape {list(embeddings.shape)}, not numbers [n, D]")
    count = len(embeddings)
    identities = [str(name) for name in columns["identity"]]
    rows = Embedded(
        np.asarray(columns.get("id", np.arange(start, start + count)), dtype=np.int64),
        np.asarray(columns.get("label", np.full(count, -1)), dtype=np.int64),
        identities,
        [str(path) for path in columns.get("path", [""] * count)],
        np.asarray(columns.get("norm", np.linalg.norm(embeddings, axis=1)), dtype=np.float32),
        embeddings.astype(np.float32, copy=False),
    )
    lengths = {len(rows.ids), len(rows.labels), len(rows.identities), len(rows.paths), len(rows.norms), count}
    if len(lengths) > 1:
        raise ValueError("its columns have different lengths")
    return rows
