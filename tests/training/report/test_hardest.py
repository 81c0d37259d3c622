"""The hardest pairs and the nearest classes equal a brute-force search at any number of ranks; their pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partial_fc import ArcFace, PartialFC
from partial_fc.training.data import GlyphIdentities, IdentityDataset, UnreadableImage
from partial_fc.training.report.hardest import (
    hardest_pairs,
    nearest_class_pairs,
    note_hardest,
    one_per_identities,
    read_pictures,
)


def cloud() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 9, (70,), generator=generator)
    return torch.randn(9, 6, generator=generator)[labels] + torch.randn(70, 6, generator=generator), labels


@pytest.mark.parametrize(
    ("world", "tile", "kept"), [(1, 1000, 20), (1, 16, 20), (3, 16, 20), (2, 7, 3000), (1, 1000, 3), (3, 16, 3)]
)
def test_hardest_pairs_are_those_of_each_two_identities(world, tile, kept):
    embeddings, labels = cloud()
    unit = embeddings.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    every = [(float(unit[i] @ unit[j]), i, j) for i in range(70) for j in range(i + 1, 70)]
    expected = (
        one_per_identities(sorted(pair for pair in every if labels[pair[1]] == labels[pair[2]]), labels, kept),
        one_per_identities(
            sorted((pair for pair in every if labels[pair[1]] != labels[pair[2]]), reverse=True), labels, kept
        ),
    )
    parts = [hardest_pairs(embeddings, labels, tile=tile, rank=rank, world=world, kept=kept) for rank in range(world)]
    for kind, reverse in ((0, False), (1, True)):
        found = one_per_identities(
            sorted((pair for part in parts for pair in part[kind]), reverse=reverse), labels, kept
        )
        wanted = expected[kind]
        assert len(found) == len(wanted) == min(kept, (9, 36)[kind])
        assert [pair[1:] for pair in found] == [pair[1:] for pair in wanted]
        assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in wanted], abs=1e-5)
        assert all(len(part[kind]) == len(one_per_identities(part[kind], labels, kept)) for part in parts), (
            "one of each two identities"
        )


@pytest.mark.parametrize(("world", "tile"), [(1, 1000), (2, 30)])
def test_a_person_that_is_stored_twice_takes_one_place(world, tile):
    """400 pairs of all but equal images, more than are kept, hide no others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat((torch.arange(2).repeat_interleave(20), torch.arange(2, 12).repeat_interleave(2)))
    centres = torch.randn(12, 8, generator=generator)
    centres[1] = centres[0]
    embeddings = centres[labels] + 0.01 * torch.randn(len(labels), 8, generator=generator)
    parts = [hardest_pairs(embeddings, labels, tile=tile, rank=rank, world=world)[1] for rank in range(world)]
    found = one_per_identities(sorted((pair for part in parts for pair in part), reverse=True), labels)
    assert len(found) == 12
    assert [sorted(labels[list(pair[1:])].tolist()) for pair in found].count([0, 1]) == 1
    alike = torch.ones(40, 3)  # a collapsed backbone: all pairs are equally hard
    assert [len(each) for each in hardest_pairs(alike, labels[:40], tile=tile)] == [2, 1]


def test_a_pair_an_identity_is_shown():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    pairs = [(0.1, 0, 1), (0.2, 1, 2), (0.3, 3, 4), (0.4, 0, 3), (0.5, 4, 1), (0.6, 5, 0)]
    assert one_per_identities(pairs, labels) == [(0.1, 0, 1), (0.3, 3, 4), (0.4, 0, 3), (0.6, 5, 0)]
    assert one_per_identities(pairs, labels, shown=2) == [(0.1, 0, 1), (0.3, 3, 4)]


def _nearest(rank: int, world: int) -> Any:
    head = PartialFC(5, 11, ArcFace(), seed=4)
    weight = head.weight.full_tensor() if world > 1 else head.weight
    return weight.detach(), nearest_class_pairs(head)


def test_nearest_classes_are_those_of_all_pairs_on_every_rank(ranks):
    answers = ranks(3).run(_nearest)
    unit = torch.nn.functional.normalize(answers[0][0].double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    expected = {tuple(sorted((row, int(cosines[row].argmax())))): float(cosines[row].max()) for row in range(11)}
    wanted = sorted(expected.items(), key=lambda item: -item[1])
    for _, pairs in answers:
        assert [pair[1:] for pair in pairs] == [key for key, _ in wanted]
        assert [pair[0] for pair in pairs] == pytest.approx([value for _, value in wanted], abs=1e-5)


class Broken(IdentityDataset):
    """Glyphs of which the first is unreadable."""

    def __init__(self) -> None:
        self.glyphs = GlyphIdentities("seen", 4)
        self.labels, self.identity_names, self.image_shape = (
            self.glyphs.labels,
            self.glyphs.identity_names,
            self.glyphs.image_shape,
        )

    def name_of(self, index: int) -> str:
        return self.glyphs.name_of(index)

    def load(self, index: int) -> torch.Tensor:
        if index == 0:
            raise UnreadableImage("0", "no such glyph")
        return self.glyphs.load(index)


def test_pictures_are_those_of_the_pairs(tmp_path: Path):
    data = Broken()
    indices = torch.arange(len(data))[5:].flip(0)  # some images could not be read; the order is another
    embeddings = torch.randn(len(indices), 8, generator=torch.Generator().manual_seed(1))
    embeddings[0] = embeddings[-1]  # of two identities: the last image and the sixth
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    note_hardest(tmp_path, "seen", data, (embeddings, data.labels[indices], indices), 7, accelerator)
    shown = read_pictures(tmp_path)["sets"]["seen"]
    first = shown["impostor"][0]
    assert first["cosine"] == pytest.approx(1, abs=1e-5)
    assert [image["name"] for image in first["images"]] == [data.name_of(39), data.name_of(5)]
    for image, index in zip(first["images"], (39, 5), strict=True):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(image["uri"].split(",")[1]))))
        assert (pixels == data.load(index)[0].numpy()).all()
    assert 1 <= len(shown["genuine"]) <= 4  # one an identity
    note_hardest(
        tmp_path, "other", data, (torch.eye(3), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 11])), 7, accelerator
    )
    pictures = json.loads((tmp_path / "pictures.json").read_text())["sets"]
    assert set(pictures) == {"seen", "other"}
    assert pictures["other"]["genuine"][0]["images"][0]["uri"] is None
