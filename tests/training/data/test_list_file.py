"""A list file of `path label` lines: which lines are valid."""

from __future__ import annotations

import os

import pytest
from data_files import picture, samples

from partial_fc.training.data import ListIdentities, UnreadableImage, open_source
from partial_fc.training.errors import UserError


def written(folder, lines, pictures=3, name="faces.txt"):
    for number in range(pictures):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def test_paths_may_have_spaces_and_be_absolute_and_labels_be_names(tmp_path):
    (tmp_path / "with space").mkdir()
    (tmp_path / "with space" / "x.jpg").write_bytes(picture(9))
    lines = ["# comment", "", "with space/x.jpg   Bo", f"{tmp_path}/0.jpg\tAda", "  1.jpg Bo  "]
    faces = ListIdentities(written(tmp_path, lines), 20, 3)
    assert faces.identity_names == ["Ada", "Bo"]
    assert faces.labels.tolist() == [1, 0, 1]
    assert [bytes(faces.encoded(index)) for index in range(3)] == [picture(9), picture(0), picture(1)]


def test_numbers_are_in_their_order_and_gaps_closed(tmp_path):
    faces = ListIdentities(written(tmp_path, ["0.jpg 10", "1.jpg 9", "2.jpg 10"]), 20, 3)
    assert (faces.identity_names, faces.labels.tolist()) == (["9", "10"], [1, 0, 1])


def test_lines_that_say_nothing_useful_are_left_out_and_named_or_refused(tmp_path):
    path = written(
        tmp_path, ["0.jpg 1", "1.jpg", "../up.jpg 2", "a\\..\\up.jpg 2", "1.jpg one", "1.jpg 1.0", "2.jpg 3"]
    )
    faces = ListIdentities(path, 20, 3)
    assert faces.labels.tolist() == [0, 1]
    assert [each.split(" (")[0] for each in faces.skipped] == [f"faces.txt line {number}" for number in (2, 3, 4, 5, 6)]
    for each, words in zip(
        faces.skipped, ("not both", "contains `..`", "contains `..`", "'one' is not an integer", "'1.0'"), strict=True
    ):
        assert words in each
    with pytest.raises(UserError, match=r"cannot read faces\.txt line 2 .*, and 4 more like it"):
        ListIdentities(path, 20, 3, on_error="raise")
    with pytest.raises(UserError, match="names no images; its lines must be `path label`"):
        ListIdentities(written(tmp_path, ["# nothing"]), 20, 3)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    faces = ListIdentities(written(tmp_path, ["pipe.jpg 0", "folder.jpg 0", "absent.jpg 0", "/dev/zero 0"]), 20, 3)
    for index, words in enumerate(("not a regular file", "not a regular file", "No such file", "not a regular file")):
        with pytest.raises(UnreadableImage, match=words):
            faces.load(index)


def test_a_picture_of_too_many_bytes_is_not_read(tmp_path):
    path = written(tmp_path, ["0.jpg 0"])
    with (tmp_path / "0.jpg").open("r+b") as file:
        file.truncate(2**40)  # a hole: no disk space
    with pytest.raises(UnreadableImage, match=r"1,099,511,627,776 bytes are too many"):
        ListIdentities(path, 20, 3).load(0)


def test_many_samples_make_no_objects(tmp_path):
    content = samples(2, 2)
    faces = ListIdentities(written(tmp_path, [f"{n}.jpg {label}" for n, (label, _) in enumerate(content)]), 20, 3)
    assert faces._names.data.nbytes == 4 * len("0.jpg")
    assert (faces._names[-1], faces._names[1:3]) == ("3.jpg", ["1.jpg", "2.jpg"])
    with pytest.raises(IndexError):
        faces._names[4]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("train.lst", ["0\t4.000000\t0.jpg", "1\t4\t1.jpg", "7\t9.0\t2.jpg"]),  # mxnet's im2rec
        ("train.lst", ["1\t0.jpg\t4", "1\t1.jpg\t4", "0\t2.jpg\t9"]),  # InsightFace's
        ("faces.txt", ["\ufeff0.jpg 4", "1.jpg 4", "2.jpg 9"]),
        ("faces.tsv", ["0.jpg\t4", "1.jpg\t4", "2.jpg\t9"]),
        ("faces.csv", ["0.jpg,4", '"1.jpg", 4', "2.jpg,9"]),
        ("faces.csv", ["\ufeffPath,Label", "0.jpg,4", "", "# 3.jpg,1", "1.jpg,4", "2.jpg,9"]),
    ],
    ids=["mxnet", "InsightFace", "a byte order mark", "tabs", "commas", "commas and a header"],
)
def test_the_forms_that_lists_have_elsewhere(tmp_path, name, lines):
    path = tmp_path / name
    written(tmp_path, lines, name=name)
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    faces = open_source(path, 20, 3)
    assert (faces.identity_names, faces.labels.tolist(), list(faces.skipped)) == (["4", "9"], [0, 0, 1], [])
    assert [bytes(faces.encoded(index)) for index in range(3)] == [picture(0), picture(1), picture(2)]
    headers = [note for note in faces.notes if "header" in note]
    assert headers == (
        ["faces.csv line 1 is a header: 'Path' does not exist, and 'Label' names a column"]
        if "Label" in lines[0]
        else []
    )


def test_labels_with_spaces_in_tables_and_a_file_that_is_called_path(tmp_path):
    faces = ListIdentities(written(tmp_path, ["0.jpg,Ada Lovelace", '"1.jpg","Bo, the other"'], name="a.csv"), 20, 3)
    assert faces.identity_names == ["Ada Lovelace", "Bo, the other"]
    (tmp_path / "path").write_bytes(picture(8))
    faces = ListIdentities(written(tmp_path, ["path\tlabel", "0.jpg\tAda"], name="a.tsv"), 20, 3)
    assert faces.identity_names == ["Ada", "label"]


def test_a_header_elsewhere_and_lines_unlike_the_first_are_named(tmp_path):
    faces = ListIdentities(written(tmp_path, ["path label", "0.jpg 1", "1.jpg 2"]), 20, 3)
    assert list(faces.skipped) == ["faces.txt line 1 (it looks like a header, which only .csv and .tsv files may have)"]
    assert faces.identity_names == ["1", "2"]
    faces = ListIdentities(written(tmp_path, ["0.jpg,1", "1.jpg", "2.jpg,1,5"], name="a.csv"), 20, 3)
    assert [each.split(" (")[1] for each in faces.skipped] == [
        "it has 1 column, and must have two: a path and a label)",
        "it has 3 columns, and must have two: a path and a label)",
    ]
    faces = ListIdentities(written(tmp_path, ["0\t4.0\t0.jpg", "1\t1.jpg\t4", "2.jpg 3"], name="a.lst"), 20, 3)
    assert [each.split(" (")[1] for each in faces.skipped] == [
        "the label '1.jpg' is not an integer)",
        "it does not have the form `number<tab>label<tab>path` of the first line)",
    ]


def test_a_list_of_which_no_path_is_there_is_refused(tmp_path):
    lines = [f"gone/{number}.jpg {number}" for number in range(300)]
    with pytest.raises(
        UserError, match=r"none of the first 100 does, and the first should be at .*gone/0\.jpg; paths are relative to"
    ):
        ListIdentities(written(tmp_path, lines), 20, 3)
    assert len(ListIdentities(written(tmp_path, [*lines[:99], "0.jpg 7"]), 20, 3)) == 100
    with pytest.raises(UserError, match=r"is not a CSV file \(.*\); fix it"):
        ListIdentities(written(tmp_path, ['"0.jpg,1', "1.jpg,1"], name="a.csv"), 20, 3)
