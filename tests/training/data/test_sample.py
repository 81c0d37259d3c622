"""The sample of images lies as a user's own would, and its parts fit together."""

from __future__ import annotations

from pathlib import Path

import torch

from partial_fc.training.cli.main import main
from partial_fc.training.data import FolderIdentities
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.data.sample import ENROLLED, PEOPLE, STRANGERS


def test_the_sample_is_the_glyphs_as_a_folder(tmp_path, capsys):
    assert main(["data", "sample", str(tmp_path / "new" / "sample"), "--identities", "12"]) == 0
    folder = tmp_path / "new" / "sample"
    assert f"{folder / 'training'}: 120 images" in capsys.readouterr().out
    training, people, visitors = (FolderIdentities(folder / each, 32, 1) for each in ("training", "people", "visitors"))
    glyphs = GlyphIdentities("train", 12)
    assert training.identity_names == sorted(glyphs.identity_names)
    place = training.identity_names.index(glyphs.identity_names[5])
    index = int((training.labels == place).nonzero()[3])
    assert torch.equal(training.load(index), glyphs.load(53))
    assert people.num_identities == PEOPLE and len(people) == PEOPLE * ENROLLED
    assert visitors.num_identities == PEOPLE + STRANGERS
    assert set(people.identity_names) < set(visitors.identity_names)
    assert not set(training.identity_names) & set(visitors.identity_names)
    files = [{dataset.name_of(index) for index in range(len(dataset))} for dataset in (people, visitors)]
    assert not files[0] & files[1], "what is enrolled is not searched for"


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert main(["data", "sample", str(tmp_path / "sample"), "--identities", "2000"]) == 2
    said = capsys.readouterr().err
    assert "2000 identities were asked for" in said and "lower --identities" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    assert main(["data", "sample", str(tmp_path / "mine")]) == 2
    assert "mine already exists; name another folder, or remove it" in capsys.readouterr().err
    assert list(Path(tmp_path / "mine").iterdir()) == []
