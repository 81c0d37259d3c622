"""RecordIO: the format byte by byte, labels by ranges and one by one, and every kind of damage."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import MAGIC, image_data, insightface, picture, pixels, record, samples, write_records

from partial_fc.training.data import RecordIdentities, UnreadableImage, open_source
from partial_fc.training.data.formats import recordio as recordio_module
from partial_fc.training.data.formats.record_file import frame, pack, read_index, read_record, unpack
from partial_fc.training.data.safe_files import LargeFiles
from partial_fc.training.errors import UserError

ROOT = Path(__file__).parents[3]
CONTENT = samples(identities=4, images=3)
WORD = struct.pack("<I", MAGIC)


def opened(folder, **settings):
    return RecordIdentities(folder / "train.rec", 20, 3, **settings)


def test_the_loader_of_the_page_gives_what_insightfaces_gives(tmp_path, monkeypatch):
    """Its images or their mirror images, in [-1, 1], with their labels; two ranks share them."""
    monkeypatch.chdir(tmp_path)
    insightface(tmp_path / "ms1m", CONTENT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    block = block.replace("batch_size=128", "batch_size=2").replace("num_workers=2", "num_workers=0")
    seen = []
    for rank in range(2):
        names = {"rank": rank, "world": 2, "__name__": "page"}
        exec(compile(block, "data.md", "exec"), names)
        assert names["num_classes"] == 4
        plain = names["faces"].data
        for place in names["sampler"]:
            image, label = names["faces"][place]
            expected = plain.load(place).float() / 127.5 - 1
            assert image.shape == (3, 112, 112) and int(label) == CONTENT[place][0]
            assert torch.equal(image, expected) or torch.equal(image, expected.flip(2))
            seen.append(place)
        images, labels = next(iter(names["train_loader"]))
        assert images.shape == (2, 3, 112, 112) and labels.dtype == torch.int64
    assert sorted(seen) == list(range(len(CONTENT)))


def test_records_are_joined_where_the_magic_number_was_cut_out(tmp_path):
    """Parts 1, 2, 3 of one record: the magic number stood between them."""
    path = tmp_path / "parts.rec"
    path.write_bytes(
        record(b"abcd", 1) + record(b"", 2) + record(b"efghijkl", 2) + record(b"xyz", 3) + record(b"alone")
    )
    files = LargeFiles([path])
    assert read_record(files, 0) == b"abcd" + WORD + WORD + b"efghijkl" + WORD + b"xyz"
    assert read_record(files, path.stat().st_size - 16) == b"alone"


def test_what_is_written_is_read_wherever_the_magic_number_lies(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "many.rec"
    for _ in range(60):
        pieces = [
            rng.bytes(int(rng.integers(0, 9))) if rng.random() < 0.6 else WORD for _ in range(int(rng.integers(0, 8)))
        ]
        data = b"".join(pieces)
        written = frame(data)
        assert len(written) % 4 == 0
        aligned = sum(data[at : at + 4] == WORD for at in range(0, len(data) // 4 * 4, 4))
        assert written[4:8] == struct.pack("<I", (1 << 29 if aligned else 0) | written_length(data))
        path.write_bytes(written)
        assert read_record(LargeFiles([path]), 0) == data


def written_length(data):
    at = next((at for at in range(0, len(data) // 4 * 4, 4) if data[at : at + 4] == WORD), len(data))
    return at


def test_a_record_longer_than_one_read_is_whole(tmp_path):
    data = np.random.default_rng(0).bytes(70_001)
    path = tmp_path / "long.rec"
    path.write_bytes(record(b"first") + record(data))
    assert read_record(LargeFiles([path]), 16) == data


def test_packing_is_the_formats_own():
    assert pack((7.0,), b"picture", 3) == image_data(7, b"picture", 3)
    assert pack((7.0, 1.0), b"picture", 3) == image_data((7, 1), b"picture", 3)
    labels, data = unpack(image_data((5, 9), b"xyz"))
    assert (labels, bytes(data)) == ((5.0, 9.0), b"xyz")
    assert unpack(image_data(4, b""))[0] == (4.0,)


@pytest.mark.parametrize("two_labels", [False, True])
def test_labels_come_from_the_ranges_of_identities(tmp_path, monkeypatch, two_labels):
    insightface(tmp_path, CONTENT, two_labels)
    monkeypatch.setattr(RecordIdentities, "_read_all_labels", None)  # no picture's label is read
    dataset = opened(tmp_path)
    assert dataset.labels.tolist() == [label for label, _ in CONTENT]
    assert torch.equal(dataset.load(5), pixels(CONTENT[5][1], 20))
    assert dataset.name_of(5) == "train.rec#6"
    assert list(dataset.notes) == []


def test_without_ranges_every_label_is_read_once_and_kept(tmp_path, monkeypatch):
    """As shuffled sets have it: no record 0, no identities, labels in any order and with gaps."""
    content = [CONTENT[index] for index in (7, 0, 11, 3, 4, 8)]  # identities 2, 0, 3, 1, 1, 2
    write_records(
        tmp_path, [(key, record(image_data(10 * label, data))) for key, (label, data) in enumerate(content)], 9
    )
    dataset = opened(tmp_path)
    assert dataset.identity_names == ["0", "10", "20", "30"]
    assert dataset.labels.tolist() == [2, 0, 3, 1, 1, 2]
    assert [bytes(dataset.encoded(index)) for index in range(6)] == [data for _, data in content]
    assert list(dataset.notes) == ["`property` says 9 classes; the records have 4"]
    monkeypatch.setattr(recordio_module, "unpack", None)
    monkeypatch.setattr(RecordIdentities, "_first_record", lambda self: None)
    assert opened(tmp_path).labels.tolist() == dataset.labels.tolist(), "from the cache"
    monkeypatch.undo()
    write_records(tmp_path, [(key, record(image_data(3, data))) for key, (_, data) in enumerate(content)])
    assert opened(tmp_path).identity_names == ["3"], "files that have changed are read anew"


def test_ranges_that_do_not_fit_are_not_believed(tmp_path):
    end = len(CONTENT) + 1
    pictures = [(key, record(image_data(label, data))) for key, (label, data) in enumerate(CONTENT, start=1)]
    for number, ranges in enumerate(
        [[(1, 4), (3, 7), (7, 13)], [(1, 2**30), (4, 7), (7, 13)], [(1, 4), (4, 7), (7, 12)], [(1, 4)] * 3]
    ):
        first = (0, record(image_data((end, end + len(ranges)), b"")))
        identities = [(end + place, record(image_data(each, b""))) for place, each in enumerate(ranges)]
        write_records(tmp_path / str(number), [first, *pictures, *identities], 4)
        assert opened(tmp_path / str(number)).labels.tolist() == [label for label, _ in CONTENT]


def test_a_label_unlike_its_identitys_is_named_when_loaded(tmp_path):
    path = insightface(tmp_path, CONTENT)
    data = path.read_bytes()
    wrong = data.replace(image_data(1, CONTENT[4][1], 5), image_data(3, CONTENT[4][1], 5))
    assert wrong != data
    path.write_bytes(wrong)
    with pytest.raises(UnreadableImage, match=r"train\.rec#5 \(its label is 3, but it is in the range of identity 1\)"):
        opened(tmp_path).load(4)


def damaged(kind):
    """(records, what is said of record 2) of pictures 0..4, the third of which is damaged."""
    good = [(key, record(image_data(label, data))) for key, (label, data) in enumerate(CONTENT[:5])]
    data = image_data(0, CONTENT[2][1])
    third, words = {
        "magic": (b"\xff\xff\xff\xff" + record(data)[4:], "its magic number is 0xffffffff, not 0xced7230a"),
        "length": (struct.pack("<II", MAGIC, 2**27) + data[:100], "continue past the end of the file"),
        "huge": (struct.pack("<II", MAGIC, (1 << 29) - 1) + data[:100], "too many for an image"),
        "flag": (record(data, 2), "has flag 2, which cannot begin a record"),
        "unknown flag": (record(data, 7), "has flag 7"),
        "no end": (record(data[:100], 1) + record(data[100:104], 0), "has flag 0, which cannot continue a record"),
        "short": (record(b"tiny"), "4 bytes, too few for the header of an image"),
        "labels": (record(struct.pack("<IfQQ", 2**31, 0, 0, 0) + b"xx"), "too few for 2,147,483,648 labels"),
        "half": (record(image_data(1.5, CONTENT[2][1])), "its label is 1.5, and must be an integer"),
        "nan": (record(image_data(float("nan"), CONTENT[2][1])), "its label is nan"),
        "negative": (record(image_data(-1, CONTENT[2][1])), "its label is -1"),
        "empty": (record(image_data(0, b"")), "there is no image in it"),
    }[kind]
    good[2] = (2, third)
    return good, words


DAMAGES = [
    "magic",
    "length",
    "huge",
    "flag",
    "unknown flag",
    "no end",
    "short",
    "labels",
    "half",
    "nan",
    "negative",
    "empty",
]


@pytest.mark.parametrize("said", [2**24, 2**24 + 8], ids=["rounded down", "rounded up"])
def test_counts_that_a_float32_has_rounded_lose_no_picture(tmp_path, said):
    """Keys up to 2**24 + 5 are pictures, those after them identities; record 0 says otherwise."""
    begin = 2**24 + 6 - len(CONTENT)
    records = [(0, record(image_data((said, said + 4), b"")))]
    records += [(begin + each, record(image_data((label, 1.0), data))) for each, (label, data) in enumerate(CONTENT)]
    records += [
        (2**24 + 6 + each, record(image_data((begin + 3 * each, begin + 3 * each + 3), b""))) for each in range(4)
    ]
    write_records(tmp_path, records, 4)
    dataset = opened(tmp_path, on_error="raise")
    assert dataset.labels.tolist() == [label for label, _ in CONTENT]
    assert list(dataset.skipped) == [] and list(dataset.notes) == []


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_record_is_left_out_and_named_or_refused(tmp_path, kind):
    records, words = damaged(kind)
    write_records(tmp_path, records, 2)
    dataset = opened(tmp_path)
    assert len(dataset) == 4
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith("train.rec#2 (")
    assert words in dataset.skipped[0]
    assert [bytes(dataset.encoded(index)) for index in range(4)] == [CONTENT[index][1] for index in (0, 1, 3, 4)]
    with pytest.raises(UserError, match=r"cannot read train\.rec#2 \(.*--data\.on_error skip"):
        opened(tmp_path, on_error="raise")


def test_a_last_record_that_is_cut_short(tmp_path):
    path = insightface(tmp_path, CONTENT)
    insightface(tmp_path / "whole", CONTENT)
    write_records(tmp_path, [(key, record(image_data(label, data))) for key, (label, data) in enumerate(CONTENT)], 4)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    dataset = opened(tmp_path)
    assert len(dataset) == len(CONTENT) - 1
    assert "train.rec#11 (the record is cut short" in dataset.skipped[0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            "0\t0\n1\t99999999\n2\t88888888\n",
            r"record 1 is at byte 99,999,999, outside train\.rec .*, and so are 1 more",
        ),
        ("0\t-4\n", "record 0 is at byte -4"),
        ("0\t0\n1\tabc\n", r"train\.idx is not a valid index: line 2 is b'1\\tabc'"),
        ("0\t0\n1\n", "is not a valid index: line 2"),
        ("0\t0\n1\t" + "9" * 40 + "\n", "is not a valid index: line 2 is b'1"),
        ("0\t0\t1\t0\n", "is not a valid index: line 1"),
        ("\n0\t0.5\n", "is not a valid index: line 2"),
        ("", "is not a valid index: it is empty"),
        ("0\t0\n0\t0\n", "has record 0 twice"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index, message):
    insightface(tmp_path, CONTENT)
    (tmp_path / "train.idx").write_text(index)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_makes_no_objects(tmp_path):
    """Two numbers a line are 16 bytes; reading, sorting and comparing them takes a few times that."""
    path = tmp_path / "many.idx"
    path.write_text("".join(f"{key}\t{8 * key}\n" for key in range(20_000)))
    read_index(path, 10**6)
    tracemalloc.start()
    keys, offsets = read_index(path, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 16 * 20_000
    assert (int(keys[-1]), int(offsets[-1])) == (19_999, 8 * 19_999)


def test_missing_and_damaged_neighbours_are_named(tmp_path):
    path = insightface(tmp_path, CONTENT)
    (tmp_path / "property").write_text("four")
    assert list(opened(tmp_path).notes) == ["`property` is not `classes,height,width` but 'four'"]
    path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"record 0, which describes the other records, cannot be read .*magic number"):
        opened(tmp_path)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(UserError, match=r"train\.rec has no index: there is no train\.idx beside it"):
        opened(tmp_path)


def test_a_file_that_changed_since_it_was_opened_is_named(tmp_path):
    path = insightface(tmp_path, CONTENT)
    dataset = opened(tmp_path)
    dataset._files._open.clear()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnreadableImage, match=r"train\.rec has changed since it was opened"):
        dataset.load(0)


def test_names_of_identities_lie_beside_the_numbers(tmp_path):
    insightface(tmp_path, [CONTENT[0], CONTENT[9]])  # identities 0 and 3
    (tmp_path / "identities.json").write_text('["Ada", "Bo", "Cy", "Di"]')
    assert opened(tmp_path).identity_names == ["Ada", "Di"]
    for text in ('["Ada"]', '{"0": 1}', "[", "[1, 2, 3, 4]"):
        (tmp_path / "identities.json").write_text(text)
        with pytest.raises(UserError, match=r"identities\.json is not a list of the names of 2 identities"):
            opened(tmp_path)


def test_a_picture_of_record_size_is_still_checked(tmp_path):
    """Bytes that are no picture, in a record that is fine."""
    insightface(tmp_path, [(0, b"no picture"), (0, picture(0))])
    with pytest.raises(UnreadableImage, match=r"train\.rec#1 \(cannot identify the 10 bytes"):
        opened(tmp_path).load(0)
