"""Parquet and Arrow files of Hugging Face `datasets`: which columns, which labels, what is refused; nothing of a data
set is run."""

from __future__ import annotations

import builtins

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_files import parquet, picture, pixels, samples

from partial_fc.training.data import ParquetIdentities, UnreadableImage, open_source
from partial_fc.training.errors import UserError

CONTENT = samples(identities=3, images=3)


def table(folder, columns, **features):
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64"), **features}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({name: kinds[name] for name in columns}))
    table.to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def images(count=3):
    return [{"bytes": picture(number), "path": None} for number in range(count)]


def test_class_labels_are_names(tmp_path):
    faces = open_source(parquet(tmp_path, CONTENT, names={0: "Cy", 1: "Ada", 2: "Bo"}), 20, 3)
    assert faces.identity_names == ["Cy", "Ada", "Bo"]
    assert faces.labels.tolist() == [label for label, _ in CONTENT]


def test_a_folder_of_save_to_disk_is_read_where_it_is(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    content = {"image": images(4), "label": ["b", "a", "b", "a"]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "saved"))
    faces = open_source(tmp_path / "saved", 20, 3)
    assert (faces.identity_names, faces.labels.tolist()) == (["a", "b"], [1, 0, 1, 0])
    assert torch.equal(faces.load(2), pixels(picture(2), 20))
    assert any(name.endswith(".arrow") for name, _ in faces.files())


def test_plain_bytes_and_columns_by_name(tmp_path):
    columns = {"face": [picture(n) for n in range(3)], "who": [7, 5, 7]}
    path = table(tmp_path, columns, face=datasets.Value("binary"), who=datasets.Value("int32"))
    faces = ParquetIdentities([path], 20, 3, image_column="face", label_column="who")
    assert (faces.identity_names, faces.labels.tolist()) == (["5", "7"], [1, 0, 1])
    assert bytes(faces.encoded(1)) == picture(1)


def test_columns_that_are_not_clear_are_asked_for(tmp_path):
    path = table(tmp_path / "a", {"image": images(), "other": images(), "label": [0, 1, 2]}, other=datasets.Image())
    with pytest.raises(
        UserError, match=r"2 columns of images among image, other, label; choose one with --data\.image_column"
    ):
        ParquetIdentities([path], 20, 3)
    assert len(ParquetIdentities([path], 20, 3, image_column="other")) == 3
    path = table(tmp_path / "b", {"image": images(), "who": [0, 1, 2]}, who=datasets.Value("int64"))
    with pytest.raises(UserError, match=r"no column of labels among image, who .*--data\.label_column"):
        ParquetIdentities([path], 20, 3)
    with pytest.raises(UserError, match=r"has no column 'name', only image, who"):
        ParquetIdentities([path], 20, 3, label_column="name")
    path = table(tmp_path / "c", {"image": images(), "label": [0.5, 1, 2]}, label=datasets.Value("float32"))
    with pytest.raises(UserError, match=r"'label' of .* holds float, not integers or strings"):
        ParquetIdentities([path], 20, 3)


def test_rows_without_label_or_image_are_named(tmp_path):
    """As other programs write them: without what `datasets` notes of types."""
    paths = [{"bytes": None, "path": path} for path in ("../up.jpg", "near.jpg")]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = {"image": pyarrow.array([*images(2), None, *paths], type=kind), "label": [4, None, 4, 4, 4]}
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    (tmp_path / "near.jpg").write_bytes(picture(50))
    faces = ParquetIdentities([path], 20, 3)
    assert list(faces.skipped) == ["train.parquet#1 (it has no label)"]
    assert len(faces) == 4
    for index, words in ((1, r"train\.parquet#2 \(there is no image"), (2, "points outside the data folder")):
        with pytest.raises(UnreadableImage, match=words):
            faces.load(index)
    assert torch.equal(faces.load(3), pixels(picture(50), 20)), "a path below the data folder"
    with pytest.raises(UserError, match=r"cannot read train\.parquet#1"):
        ParquetIdentities([path], 20, 3, on_error="raise")


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    path = table(tmp_path, {"image": images(), "label": [0, 1, 2]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train\.parquet cannot be read: ") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path, CONTENT)
    real = builtins.__import__

    def without(name, *arguments, **settings):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'partial_fc\[data\]'"):
        open_source(path)
