"""WebDataset tar files: read as the library writes and groups them; damaged, foreign and hostile members."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from data_files import pixels, samples, shards, write_tar
from runner import forking
from webdataset.tariterators import group_by_keys, tar_file_iterator

from partial_fc.checkpoint import locks
from partial_fc.training.data import TarIdentities, UnreadableImage, open_source
from partial_fc.training.data import index_cache as files
from partial_fc.training.errors import UserError

CONTENT = samples(identities=4, images=3)
A, B, C = (data for _, data in CONTENT[:3])


def opened(*paths, **settings):
    return TarIdentities(paths, 20, 3, **settings)


def test_what_webdataset_writes_is_read_and_grouped_alike(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/set-%03d.tar", maxcount=5, verbose=0) as out:
        for number, (label, data) in enumerate(CONTENT):
            key = f"part{number % 2}/a{number:03d}"
            out.write({"__key__": key, "jpg": data, "cls": label, "extra.json": {"label": 99}} if number % 3 else
                      {"__key__": key, "face.jpg": data, "json": {"label": label}})  # fmt: skip
    dataset = open_source(tmp_path, 20, 3)
    assert dataset.labels.tolist() == [label for label, _ in CONTENT]
    assert [bytes(dataset.encoded(index)) for index in range(len(dataset))] == [data for _, data in CONTENT]
    keys = []
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            members = ({**member, "__url__": path.name} for member in tar_file_iterator(file))
            keys += [sample["__key__"] for sample in group_by_keys(members)]
    assert [dataset.name_of(index).split("/", 1)[1] for index in range(len(dataset))] == keys
    assert torch.equal(dataset.load(9), pixels(CONTENT[9][1], 20))


def test_labels_with_gaps_and_labels_that_are_names(tmp_path):
    shards(tmp_path / "numbers", [(label * 7 - 1, data) for label, data in CONTENT])
    assert open_source(tmp_path / "numbers").identity_names == ["-1", "6", "13", "20"]
    shards(tmp_path / "names", [(f"person {9 - label}", data) for label, data in CONTENT], as_json=True)
    dataset = open_source(tmp_path / "names")
    assert dataset.identity_names == ["person 6", "person 7", "person 8", "person 9"]
    assert dataset.labels.tolist() == [3 - label for label, _ in CONTENT]


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    shards(tmp_path, CONTENT)
    first = open_source(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert open_source(tmp_path).labels.tolist() == first.labels.tolist()
    write_tar(tmp_path / "faces-000.tar", [("x.jpg", A), ("x.cls", b"5")])
    assert len(open_source(tmp_path)) == len(CONTENT) - 5 + 1
    with pytest.raises(UnreadableImage, match=r"faces-000\.tar has changed since it was opened"):
        first.load(0)


def test_a_shard_that_is_rewritten_in_place_is_found_changed(tmp_path):
    """Of the same size, while it is open."""
    shards(tmp_path, CONTENT)
    dataset = open_source(tmp_path, 20, 3)
    dataset.load(0)
    path = tmp_path / "faces-000.tar"
    with path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(100))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))  # clocks of file systems are coarse
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=r"faces-000\.tar has changed since it was opened"):
            dataset.load(0)
    dataset.load(len(CONTENT) - 1)


def test_samples_that_are_not_whole_are_left_out_and_named_or_refused(tmp_path):
    path = write_tar(
        tmp_path / "mixed.tar",
        [
            ("README", b"no sample"),
            ("0.jpg", A), ("0.cls", b"3"),
            ("1.jpg", A),
            ("2.cls", b"3"),
            ("3.jpg", A), ("3.cls", b"three"),
            ("4.jpg", A), ("4.json", b"{"),
            ("5.jpg", A), ("5.json", b'{"label": 1.5}'),
            ("6.jpg", A), ("6.json", b'{"label": "Ada"}'),
            ("7.jpg", A), ("7.json", b'{"label": true}'),
            ("8.jpg", A), ("8.cls", b" 4\n"),
            ("9.jpg", A), ("9.cls", b"1" * 70000),
        ],
    )  # fmt: skip
    dataset = opened(path)
    assert [dataset.name_of(index) for index in range(len(dataset))] == ["mixed.tar/0", "mixed.tar/8"]
    said = dict(each.split(" (", 1) for each in dataset.skipped)
    words = {
        "README": "no image", "1": "no label", "2": "no image", "3": "'three' is not an integer", "4": "no `label`",
        "5": "'1.5' is neither an integer", "6": "unlike the first", "7": "'True'", "9": "too many for a label",
    }  # fmt: skip
    assert set(said) == {f"mixed.tar/{key}" for key in words}
    for key, text in words.items():
        assert text in said[f"mixed.tar/{key}"]
    with pytest.raises(UserError, match=r"cannot read mixed\.tar/README .*, and 8 more like it; fix or remove it"):
        opened(path, on_error="raise")


def test_a_name_that_comes_twice_is_left_out_and_named_or_refused(tmp_path):
    """Its pictures and labels cannot be told apart; another picture of the sample, under a longer suffix, can."""
    dup = [("dup.jpg", A), ("dup.cls", b"0"), ("dup.jpg", B), ("dup.cls", b"1")]
    path = write_tar(tmp_path / "a.tar", [*dup, ("fine.jpg", C), ("fine.side.jpg", B), ("fine.cls", b"1")])
    dataset = opened(path)
    assert list(dataset.skipped) == ["a.tar/dup (two .jpg members have this name, one after the other)"]
    assert [bytes(dataset.encoded(index)) for index in range(len(dataset))] == [C]
    with pytest.raises(UserError, match=r"cannot read a\.tar/dup"):
        opened(path, on_error="raise")


def test_members_that_lead_out_or_are_no_files_are_left_out_and_nothing_is_written(tmp_path):
    path = tmp_path / "in" / "hostile.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../up.jpg", "a/../../up.jpg", "/etc/absolute.jpg", "..\\up.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(A)
            archive.addfile(info, io.BytesIO(A))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"kind{ord(kind)}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in (("fine.jpg", B), ("fine.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    dataset = opened(path)
    assert len(dataset) == 1
    assert bytes(dataset.encoded(0)) == B
    assert sum("points outside the archive" in each for each in dataset.skipped) == 4
    assert sum("not a regular file" in each for each in dataset.skipped) == 4
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cut", [300, 700])
def test_a_shard_that_is_cut_short_ends_there(tmp_path, cut):
    """Within the picture of the second sample, and within the header that follows."""
    path = write_tar(
        tmp_path / "cut.tar",
        [("0.jpg", A), ("0.cls", b"0"), ("1.jpg", B), ("1.cls", b"1"), ("2.jpg", C), ("2.cls", b"0")],
    )
    begin = 2 * 512 + -(-len(A) // 512) * 512 + 512
    with path.open("r+b") as file:
        file.truncate(begin + 512 + cut)
    dataset = opened(path)
    assert len(dataset) == 1
    assert bytes(dataset.encoded(0)) == A
    assert any("cut.tar" in each and "cut short" in each for each in dataset.skipped)
    with pytest.raises(UserError, match=r"cannot read cut\.tar"):
        opened(path, on_error="raise")


def damaged(path, change):
    """A shard of ten samples, and what `change(its bytes, offset of the sixth sample's header)` makes of them."""
    members = [
        (f"{n}.{kind}", data) for n in range(10) for kind, data in (("jpg", A), ("cls", b"0" if n < 5 else b"1"))
    ]
    whole = write_tar(path, members).read_bytes()
    path.write_bytes(bytes(change(bytearray(whole), whole.index(b"5.jpg"))))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data, at: data[: at + 120] + bytes([data[at + 120] ^ 4]) + data[at + 121 :],
            "the header at byte {at:,} is damaged",
        ),
        (lambda data, at: data[:at], "cut short: there is no end-of-archive marker at byte {at:,}"),
        (lambda data, at: data[: at + 200], "cut short: there is no end-of-archive marker at byte {at:,}"),
        (
            lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
            "a block of zeros at byte {at:,} ends the archive, but data follow",
        ),
    ],
    ids=["a bit of a header", "between members", "within a header", "a header of zeros"],
)
def test_a_shard_that_ends_too_early_is_named_or_refused(tmp_path, change, words):
    at = len(damaged(tmp_path / "where.tar", lambda data, at: data[:at]).read_bytes())
    path = damaged(tmp_path / "damaged.tar", change)
    dataset = opened(path)
    assert len(dataset) == 5
    (problem,) = dataset.skipped
    assert problem.startswith("damaged.tar (") and words.format(at=at) in problem
    with pytest.raises(UserError, match=r"cannot read damaged\.tar \("):
        opened(path, on_error="raise")


def test_shards_that_are_joined_are_named_and_any_number_of_zeros_ends_one(tmp_path):
    first, second = (
        write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", A), (f"{n}.cls", b"0")]).read_bytes() for n in range(2)
    )
    (tmp_path / "joined.tar").write_bytes(first + second)
    (problem,) = opened(tmp_path / "joined.tar").skipped
    assert "archives were joined by `cat`" in problem
    content = first.rstrip(b"\0")
    whole = -(-len(content) // 512) * 512
    for zeros in (512, 1024, 50 * 512):
        (tmp_path / "end.tar").write_bytes(content.ljust(whole, b"\0") + bytes(zeros))
        assert list(opened(tmp_path / "end.tar", on_error="raise").skipped) == []


def test_files_that_are_no_plain_tar_files_are_refused(tmp_path):
    plain = write_tar(tmp_path / "plain.tar", [("0.jpg", A), ("0.cls", b"0")])
    (tmp_path / "packed.tar").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "noise.tar").write_bytes(b"nothing of the kind" * 100)
    (tmp_path / "none.tar").write_bytes(b"")
    write_tar(tmp_path / "others.tar", [("a.txt", b"text")])
    for name, words in {
        "packed": "is compressed, so single images cannot be read from it; decompress it",
        "noise": "is not a tar file",
        "none": "is not a tar file",
        "others": "have no sample with an image and a label; the first problem: others.tar/a",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            opened(tmp_path / f"{name}.tar")
        assert "\n" not in str(caught.value)


def index_of(path, looked, builds, go, out):
    """What a rank does at its start: the index from the cache, or built, once `go` is set. `looked`: it found none.
    `builds` counts."""
    os.environ["PARTIAL_FC_CACHE"] = str(path.parent / "cache")
    kept = files._read

    def looks(*given):
        found = kept(*given)
        looked.set()
        return found

    def build():
        with builds.get_lock():
            builds.value += 1
        assert go.wait(60)
        return {"numbers": np.arange(3)}

    files._read = looks
    out.put(files.cached("test", [path], build)["numbers"].tolist())


def test_of_several_processes_one_builds_an_index_and_the_others_wait_for_it(tmp_path):
    context = forking()
    (tmp_path / "data").write_text("data")
    builds, go, out, looked = (
        context.Value("i", 0),
        context.Event(),
        context.Queue(),
        [context.Event() for _ in range(3)],
    )
    processes = [
        context.Process(target=index_of, args=(tmp_path / "data", each, builds, go, out), daemon=True)
        for each in looked
    ]
    for process in processes:
        process.start()
    for each in looked:
        assert each.wait(60)  # none has found an index, and one is building it
    go.set()
    assert [out.get(timeout=60) for _ in processes] == [[0, 1, 2]] * 3
    for process in processes:
        process.join(60)
    assert builds.value == 1


def test_without_locks_every_process_builds_for_itself(tmp_path, monkeypatch):
    def refuses(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuses)
    shards(tmp_path / "data", CONTENT)
    assert len(open_source(tmp_path / "data")) == len(CONTENT)


def test_a_cache_folder_that_cannot_be_used_costs_time_alone(tmp_path, monkeypatch):
    shards(tmp_path / "data", CONTENT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "file"))
    assert len(open_source(tmp_path / "data")) == len(open_source(tmp_path / "data")) == len(CONTENT)
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    open_source(tmp_path / "data")
    (index,) = (tmp_path / "cache").glob("webdataset-*.npz")
    index.write_bytes(b"damaged")
    assert len(open_source(tmp_path / "data")) == len(CONTENT)
