"""The threshold of a gallery equals that of plain loops: FAR of an image with other identities, TAR, FPIR."""

from __future__ import annotations

import numpy as np
import pytest
from test_gallery import Images, built, images, unit

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import BINS
from partial_fc.training.gallery import Gallery


def scores(data: Images, mode: str) -> tuple[list[float], list[float]]:
    """(genuine, impostor) cosines of each image with each identity, without itself, in float64."""
    rows, names = unit(data[0]), data[1]
    genuine, impostor = [], []
    for place, row in enumerate(rows):
        for name in sorted(set(names)):
            own = [other for other, each in enumerate(names) if each == name and other != place]
            if not own:
                continue
            score = unit(rows[own].sum(0)) @ row if mode == "mean" else max(float(rows[other] @ row) for other in own)
            (genuine if name == names[place] else impostor).append(float(score))
    return genuine, impostor


@pytest.mark.parametrize("mode", ["mean", "all"])
def test_far_and_tar_are_those_of_loops(tmp_path, mode):
    held = built(tmp_path / "g", images(10, seed=3), per_identity=mode)
    data = images(40, each=2, seed=1, noise=1.0, start=100)
    data = np.concatenate((data[0], images(1, each=1, seed=8)[0])), [*data[1], "alone"]
    found = held.calibrate(*data, far=0.02)
    genuine, impostor = scores(data, mode)
    assert found.comparisons == len(impostor) and found.images == 81 and found.identities == 41
    allowed = int(0.02 * len(impostor))
    ranked = sorted(impostor, reverse=True)
    assert ranked[allowed] < found.threshold <= ranked[allowed - 1] + 1e-5, "the lowest that accepts no more"
    assert found.threshold - ranked[allowed] <= 2 / BINS + 1e-5
    assert abs(found.tar - np.mean(np.array(genuine) >= found.threshold)) <= 1 / len(genuine)
    best = [answer.matches[0].cosine for answer in held.search(data[0], 1)]
    assert found.strangers == 81 and found.fpir == pytest.approx(np.mean(np.array(best) >= found.threshold))
    assert held.threshold == found.threshold == Gallery.open(tmp_path / "g").threshold
    assert held.manifest.calibration["far"] == 0.02 and "FAR at most 0.02" in found.summary()


def test_fpir_is_that_of_searches_by_strangers(tmp_path):
    enrolled = images(30, seed=3)
    held = built(tmp_path / "g", enrolled)
    strangers = images(60, seed=4, start=50)
    found = held.calibrate(*strangers, fpir=0.1)
    best = np.array([answer.matches[0].cosine for answer in held.search(strangers[0], 1)])
    assert int((best >= found.threshold).sum()) == 18, "as many as allowed of 180"
    assert found.fpir == pytest.approx(0.1) and found.far is None
    assert sum(not answer.nobody for answer in held.search(strangers[0], 1)) == 18


def test_enrolled_identities_are_no_strangers(tmp_path):
    enrolled = images(30, seed=3)
    held = built(tmp_path / "g", enrolled)
    found = held.calibrate(*enrolled, far=0.05)
    assert found.fpir is None and found.strangers == 0 and "FPIR" not in found.summary()
    with pytest.raises(UserError, match="0 images of strangers are too few"):
        held.calibrate(*enrolled, fpir=0.1)


def test_too_few_images_are_refused_and_the_threshold_stays(tmp_path):
    held = built(tmp_path / "g", images(5))
    held.set_threshold(0.25)
    data = images(6, start=50)
    for arguments, words in (
        ({"far": 1e-4}, r"90 comparisons .* too few .* 0.0001: 10 must be accepted; .* --far 0.12$"),
        ({"fpir": 0.1}, r"18 images of strangers are too few .*, or ask for a larger share: --fpir 0.56$"),
        ({"far": 0.0}, "give a share between 0 and 1"),
        ({"far": float("nan")}, "give a share between 0 and 1"),
        ({"fpir": 1.5}, "give a share between 0 and 1"),
        ({}, "give either far or fpir"),
        ({"far": 0.1, "fpir": 0.1}, "give either far or fpir"),
    ):
        with pytest.raises(UserError, match=words):
            held.calibrate(*data, **arguments)
    with pytest.raises(UserError, match="all images are of one identity"):
        held.calibrate(*images(1, each=30), far=0.5)
    with pytest.raises(UserError, match="18 embeddings and 1 identities"):
        held.calibrate(data[0], ["a"], far=0.1)
    assert held.threshold == 0.25
