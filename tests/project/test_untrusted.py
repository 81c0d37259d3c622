"""Untrusted files: nothing in them runs, nothing outside their folder is touched, and their sizes are not believed."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from partial_fc import ArcFace, PartialFC, RankFiles, import_weights, load_checkpoint, save_checkpoint
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.checkpoint.save_load import stored_tensors, stored_values, stream_tensor
from partial_fc.training.cli.main import main
from partial_fc.training.data import DataConfig, FolderIdentities, UnreadableImage, open_data
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.errors import UserError
from partial_fc.training.run import RunFolder
from partial_fc.weights.safetensors_file import SafetensorsRows, read_header

D, C = 4, 7


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(tmp_path / "a", head=PartialFC(D, C))
    return tmp_path / "a"


def data_of(folder: Path) -> Path:
    return next(folder.glob("data-*"))


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {file.name: file.stat().st_size for file in data_of(folder).iterdir()}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def change_metadata(folder: Path, change: Any) -> None:
    """Edit what is in .metadata, and let the manifest agree."""
    path = data_of(folder) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    change_manifest(folder)


READERS = {
    "load_checkpoint": lambda folder: load_checkpoint(folder, head=PartialFC(D, C)),
    "stored_tensors": stored_tensors,
    "stored_values": lambda folder: stored_values(folder, "head"),
    "stream_tensor": lambda folder: stream_tensor(folder, "head/weight", lambda first, rows: None),
    "import_weights": lambda folder: import_weights(folder, PartialFC(D, C)),
}


@pytest.mark.parametrize("reader", READERS)
def test_checkpoint_metadata_runs_nothing(checkpoint, marker, reader):
    (data_of(checkpoint) / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    change_manifest(checkpoint)
    with pytest.raises(
        ValueError, match=r"\.metadata is damaged: .*system, which no checkpoint needs; do not trust this file"
    ):
        READERS[reader](checkpoint)
    assert not marker.exists()


class Attribute:
    """Pickled as `getattr(of, name)`."""

    def __init__(self, of: object, name: str) -> None:
        self.call = getattr, (of, name)

    def __reduce__(self) -> Any:
        return self.call


class ByName(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, _MEM_FORMAT_ENCODING) else NotImplemented


def test_a_member_of_an_enum_may_be_pickled_by_its_name(checkpoint):
    """As Python 3.11.0 to 3.11.3 write the memory formats of checkpoints."""

    expected = PartialFC(D, C)
    load_checkpoint(checkpoint, head=expected)
    path, written = data_of(checkpoint) / ".metadata", io.BytesIO()
    ByName(written).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in written.getvalue()
    path.write_bytes(written.getvalue())
    change_manifest(checkpoint)
    head = PartialFC(D, C, init_std=1.0)
    load_checkpoint(checkpoint, head=head)
    assert torch.equal(head.weight, expected.weight)


@pytest.mark.parametrize(
    ("of", "name"), [(_MEM_FORMAT_ENCODING, "__class__"), (torch.Size, "__init__"), (collections.OrderedDict, "pop")]
)
def test_no_other_attribute_is_had_by_metadata(checkpoint, of, name):
    (data_of(checkpoint) / ".metadata").write_bytes(pickle.dumps(Attribute(of, name)))
    change_manifest(checkpoint)
    with pytest.raises(ValueError, match=rf"\.metadata is damaged: .*{name}' of .*, which no checkpoint needs"):
        load_checkpoint(checkpoint, head=PartialFC(D, C))


@pytest.mark.parametrize("name", ["head", "head/weight"])
def test_checkpoint_data_runs_nothing(checkpoint, marker, name):
    """A pickle in the place of values, and of a tensor."""
    metadata = SafeReader(data_of(checkpoint)).read_metadata()
    ((_, info),) = [(index, info) for index, info in metadata.storage_data.items() if index.fqn == name]  # type: ignore[union-attr]
    file = data_of(checkpoint) / info.relative_path
    content = bytearray(file.read_bytes())
    payload = pickle.dumps(Payload(marker))
    assert len(payload) <= info.length
    content[info.offset : info.offset + info.length] = payload.ljust(info.length, b"\0")
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=str(checkpoint)):
        load_checkpoint(checkpoint, head=PartialFC(D, C))
    assert not marker.exists()


@pytest.mark.parametrize("data", ["..", ".", "", "../a", "/tmp", "data-1", 7, None, ["data-0001"]])
def test_a_manifest_names_its_own_data_only(checkpoint, data):
    (checkpoint.parent / ".metadata").write_bytes((data_of(checkpoint) / ".metadata").read_bytes())
    change_manifest(checkpoint, data=data)
    with pytest.raises(ValueError, match=r"manifest.json names .*, which is not a folder next to it"):
        load_checkpoint(checkpoint, head=PartialFC(D, C))


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "..", "", "a/b"])
def test_files_outside_their_folder_are_refused(checkpoint, name):
    change_manifest(checkpoint, files={name: 1})
    with pytest.raises(ValueError, match=r"manifest\.json names .*do not trust this checkpoint"):
        load_checkpoint(checkpoint, head=PartialFC(D, C))

    def elsewhere(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    change_metadata(checkpoint, elsewhere)
    with pytest.raises(ValueError, match=r"\.metadata names .*do not trust this checkpoint"):
        load_checkpoint(checkpoint, head=PartialFC(D, C))


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '{"data": 1}', "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\udcff"]
)
def test_manifests_of_another_kind_are_refused(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"manifest\.json|has format"):
        load_checkpoint(checkpoint, head=PartialFC(D, C))


def larger(metadata: Any) -> None:
    stored = metadata.state_dict_metadata["head/weight"]
    stored.size = torch.Size([10**12, D])


def far(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = 1 << 50


def negative(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = -1


def short(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length = 1


def lost(metadata: Any) -> None:
    metadata.state_dict_metadata["head/weight"].chunks.clear()


@pytest.mark.parametrize("change", [larger, far, negative, short, lost])
@pytest.mark.parametrize("reader", READERS)
def test_sizes_in_a_checkpoint_are_not_believed(checkpoint, change, reader):
    change_metadata(checkpoint, change)
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        READERS[reader](checkpoint)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_metadata_is_refused_or_read(tmp_path_factory, at, byte, cut):
    """One byte is another, or the file ends there: what is raised names the file."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        save_checkpoint(folder, head=PartialFC(D, C))
    path = data_of(folder) / ".metadata"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[at % len(good)] = byte
    said = ""
    try:
        path.write_bytes(bad[: at % len(good)] if cut else bad)
        change_manifest(folder)
        SafeReader(data_of(folder)).check()
    except (ValueError, OSError) as error:
        said = str(error)
    finally:
        path.write_bytes(good)
    assert str(data_of(folder)) in said or not (cut or said)


def test_files_of_other_trainers_run_nothing(tmp_path, marker):
    for old in (False, True):
        path = tmp_path / "softmax_fc_gpu_0.pt"
        torch.save({"weight": torch.zeros(3, D), "more": Payload(marker)}, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=r"softmax_fc_gpu_0.pt refers to .*system"):
            RankFiles([path])
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
        with pytest.raises(ValueError, match=r"softmax_fc_gpu_0.pt"):
            RankFiles([path])
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------- safetensors


def safetensors(path: Path, header: Any, data: int = 64, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def entry(start: Any, stop: Any, shape: Any = (2, 2), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


BAD_HEADERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a huge header": ({"a": entry(0, 16)}, {"length": 2**63}),
    "a header over the limit": ({"a": entry(0, 16)}, {"length": 99_999_999}),
    "no header": (b"", {"length": 0}),
    "a file of 3 bytes": (b"", {"data": 0, "length": 0}),
    "no JSON": (b"{]", {}),
    "deep JSON": (b"[" * 200_000, {}),
    "a number without end": (b'{"a": ' + b"9" * 5000 + b"}", {}),
    "a list": ([1], {}),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        {},
    ),
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, {}),
    "the same place": ({"a": entry(0, 16), "b": entry(0, 16)}, {}),
    "negative offsets": ({"a": entry(-16, 0)}, {}),
    "backwards": ({"a": entry(16, 0)}, {}),
    "beyond the file": ({"a": entry(0, 4 * 10**12, (10**6, 10**6))}, {}),
    "a shape that is not its bytes": ({"a": entry(0, 16, (10**9, 10**9))}, {}),
    "a negative shape": ({"a": entry(0, 16, (-2, -2))}, {}),
    "a shape beyond 64 bits": ({"a": entry(0, 0, (10**30, 0))}, {}),
    "true for a number": ({"a": entry(False, 16)}, {}),
    "a fraction": ({"a": entry(0.0, 16.0)}, {}),
    "a text for a shape": ({"a": entry(0, 16, "22")}, {}),
    "an unknown dtype": ({"a": entry(0, 16, dtype="F7")}, {}),
    "a table for a dtype": ({"a": entry(0, 16, dtype={})}, {}),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 2]}}, {}),
    "metadata that is no text": ({"__metadata__": {"x": 1}, "a": entry(0, 16)}, {}),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_safetensors_are_refused_before_anything_is_allocated(tmp_path, case):
    header, options = BAD_HEADERS[case]
    path = safetensors(tmp_path / "weights.safetensors", header, **options)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        SafetensorsRows(path, "a")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        import_weights(path, PartialFC(2, 2), key="a")


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "../x", "/x", "__metadata__"]),
        st.one_of(
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "I8", "F7", None]),
                    "shape": st.lists(st.sampled_from([-1, 0, 1, 2, 4, 2**40, 2**70, 1.5, None]), max_size=3),
                    "data_offsets": st.lists(st.sampled_from([-1, 0, 8, 16, 32, 64, 65, 2**62]), max_size=3),
                }
            ),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=3),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            ),
        ),
        max_size=3,
    ),
    length=st.sampled_from([None, None, None, 0, 1, 7, 2**31, 2**64 - 1]),
)
def test_any_header_is_read_or_refused_by_name(tmp_path_factory, header, length):
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    path = safetensors(folder / "any.safetensors", header, length=length)
    said = ""
    try:
        for name in read_header(path).tensors:
            rows = SafetensorsRows(path, name)
            assert len(rows.rows(0, min(2, rows.shape[0]))) <= 2
    except ValueError as error:
        said = str(error)
    assert str(path) in said or not said
    assert {p.name for p in path.parent.iterdir() if p.is_file()} <= {
        "any.safetensors"
    }  # no name was taken for a place to write to


# --------------------------------------------------------------------------------------------- settings and run folders


MODULE = """
from pathlib import Path
Path({marker!r}).touch()
from partial_fc.training.config import HeadConfig
class Own(HeadConfig): pass
"""


@pytest.mark.parametrize("command", ["train", "doctor", "comms"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: !!python/object/apply:os.system ['touch {marker}']\n", "could not determine a constructor"),
        ("seed: !!python/name:own_module.Own\n", "could not determine a constructor"),
        ("head:\n  class_path: own_module.Own\n", "class_path names code"),
        ("head: own_module.Own\n", "head is a table of settings"),
        ("output:\n  trackers:\n  - class_path: own_module.Own\n", "class_path names code"),
        ("class_path: own_module.Own\ninit_args: {{}}\n", "class_path names code"),
        ("head:\n  margin: own_module.Own\n", "head.margin names code"),
        ("head:\n  margin: {{class_path: own_module.Own}}\n", "head.margin names code"),
        ("head:\n  margin: \"'own_module.Own'\"\n", "head.margin names code"),
        ("optimizer: own_module.Own\n", "optimizer names code"),
        ("head_optimizer: {{class_path: own_module.Own}}\n", "head_optimizer names code"),
        ("optimizer: {{class_path: torch_optimizer.own_module.Own}}\n", "optimizer names code"),
        ("optimizer: {{class_path: partial_fc.margins.fixed.math.own_module}}\n", "cannot be imported"),
        ("data:\n  mix: [{{class_path: own_module.Own}}]\n", "class_path names code"),
        ("data: own_module.Own\n", "data is a table of settings"),
    ],
)
def test_settings_run_nothing(tmp_path, marker, monkeypatch, capsys, command, text, words):
    (tmp_path / "own_module.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "settings.yaml"
    path.write_text(text.format(marker=marker))
    assert main([command, str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and str(path) in said
    assert not marker.exists() and "own_module" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head:\n  margin: {init_args: {class_path: own_module.Own}}\n", "ArcFace has no argument class_path"),
        ("optimizer: {class_path: SGD, init_args: {lr: own_module.Own}}\n", "a setting cannot be a tensor"),
        ("optimizer: {class_path: SGD, init_args: {lr: {class_path: own_module.Own}}}\n", "cannot be a tensor"),
        ("data:\n  mix: [own_module.Own]\n", "data.mix[0] is a table of settings"),
    ],
)
def test_arguments_of_classes_run_nothing(tmp_path, marker, monkeypatch, mistake, text, words):
    (tmp_path / "own_module.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "settings.yaml").write_text(text)
    assert words in mistake("train", str(tmp_path / "settings.yaml"))
    assert not marker.exists() and "own_module" not in sys.modules


def test_settings_of_a_run_folder_run_nothing(tmp_path, marker, monkeypatch, capsys):
    (tmp_path / "own_module.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run").mkdir()
    for text in ("head:\n  class_path: own_module.Own\n", "head:\n  margin: {class_path: own_module.Own}\n"):
        (tmp_path / "run" / "config.yaml").write_text(text)
        for arguments in (
            ["train", "--resume", str(tmp_path / "run")],
            ["evaluate", str(tmp_path / "run")],
            ["audit", str(tmp_path / "run")],
        ):
            assert main(arguments) == 2
            assert "config.yaml" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 1}', "[" * 100_000])
def test_a_damaged_history_is_named(tmp_path, text):
    (tmp_path / "history.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        RunFolder(tmp_path).history(up_to_step=3)


# ---------------------------------------------------------------------------------------------------- images


def png(width: int, height: int) -> bytes:
    """The beginning of a picture of that size; almost no bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two identities of three good images each, and five bad ones."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / name / f"{i}.png").write_bytes(encoded("PNG"))
    bad = {
        "bomb.png": png(50_000, 50_000),
        "large.png": png(12_000, 12_000),
        "cut.png": encoded("PNG")[:-200],
        "cut.jpg": encoded("JPEG")[:-200],
    }
    bad["pickle.png"] = pickle.dumps(Payload(tmp_path / "marker"))
    for name, content in bad.items():
        (tmp_path / "data" / "a" / name).write_bytes(content)
    return tmp_path / "data"


BAD = ("bomb.png", "cut.jpg", "cut.png", "large.png", "pickle.png")


def test_bombs_and_truncated_images_are_counted_and_named(pictures):
    data = open_data(DataConfig(folder=str(pictures), image_size=16), seed=0).train
    loader = BatchLoader(data, batch_size=4, shuffle=False, drop_last=False, on_error="skip")
    loader.set_epoch(0)
    batches = list(loader.iterate(0))
    named = [name for batch in batches for name in batch.unreadable]
    assert len(named) == len(BAD) and sum(len(batch.labels) for batch in batches) == 6
    for bad in BAD:
        assert any(f"a/{bad}" in name for name in named), bad
    refusing = BatchLoader(data, batch_size=4, shuffle=False, drop_last=False, on_error="raise")
    refusing.set_epoch(0)
    with pytest.raises(UserError, match=r"cannot read the image .*a/(bomb|cut|large|pickle)"):
        list(refusing.iterate(0))
    assert not (pictures.parent / "marker").exists()


def test_a_bomb_takes_no_memory(pictures):
    import tracemalloc

    data = FolderIdentities(pictures, 16, 3)
    (at,) = [i for i in range(len(data)) if "bomb" in data.name_of(i)]
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"bomb\.png"):
        data.load(at)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_names_in_a_checkpoint_of_a_head_are_the_heads(checkpoint):
    """The good one is read by all of them."""
    for reader in READERS.values():
        reader(checkpoint)
    assert stored_tensors(checkpoint)["head/weight"][0] == torch.Size([C, D])
    assert ArcFace.__name__ in stored_values(checkpoint, "head")["_extra_state"]["margin"]
