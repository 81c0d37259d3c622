"""Template verification against plain loops in numpy and scikit-learn's ROC; lists that cannot be used are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_curve
from sklearn.preprocessing import normalize
from torch import Tensor

from partial_fc.training.config import EvaluationConfig
from partial_fc.training.data import UnreadableImage
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import pool_templates, read_pairs, read_templates, score_templates
from partial_fc.training.protocols.images import REFERENCE, AlignedImages, ListedImages
from partial_fc.training.protocols.task_files import open_tasks
from partial_fc.training.protocols.tasks import TemplatePairs
from partial_fc.training.protocols.templates import read_detector_scores, read_points


def some_images(subjects: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(embeddings [n, 12], template ids, media ids, weights, subject of each template id): two templates a subject, of
    1 to 6 images."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(subjects, 12))
    rows, templates, media = [], [], []
    ids = rng.permutation(10 * subjects)[: 2 * subjects]
    for k, template in enumerate(ids):
        for _ in range(rng.integers(1, 7)):
            rows.append(centres[k // 2] * rng.uniform(0.5, 3) + 2.2 * rng.normal(size=12))
            templates.append(template)
            media.append(rng.integers(0, 3))  # the same ids in other templates are other media
    order = rng.permutation(len(rows))
    subject = np.full(10 * subjects, -1)
    subject[ids] = np.arange(2 * subjects) // 2
    return np.array(rows)[order], np.array(templates)[order], np.array(media)[order], rng.random(len(rows)), subject


def pooled_by_loops(
    embeddings: np.ndarray, templates: np.ndarray, media: np.ndarray, weights: np.ndarray | None
) -> dict[int, np.ndarray]:
    found = {}
    for template in sorted(set(templates.tolist())):
        total = np.zeros(embeddings.shape[1])
        for medium in sorted(set(media[templates == template].tolist())):
            rows = [
                embeddings[i] * (1 if weights is None else weights[i])
                for i in range(len(embeddings))
                if templates[i] == template and media[i] == medium
            ]
            total += sum(rows) / len(rows)
        found[template] = total / np.linalg.norm(total)
    return found


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_pooling_is_that_of_loops(weighted, normalized):
    embeddings, templates, media, weights, _ = some_images()
    rows = normalize(embeddings) if normalized else embeddings
    expected = pooled_by_loops(rows, templates, media, weights if weighted else None)
    x, t, m, w = tensors(embeddings, templates, media, weights)
    ids, pooled = pool_templates(x, t, m, weights=w if weighted else None, normalize_images=normalized)
    assert ids.tolist() == sorted(expected)
    np.testing.assert_allclose(pooled.numpy(), np.stack([expected[i] for i in ids.tolist()]), atol=2e-6)


def all_pairs(subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.flatnonzero(subject >= 0)
    pairs = np.array([(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]])
    return pairs, subject[pairs[:, 0]] == subject[pairs[:, 1]]


def test_scores_are_cosines_and_tar_that_of_scikit_learn():
    embeddings, templates, media, _, subject = some_images()
    expected = pooled_by_loops(embeddings, templates, media, None)
    pairs, same = all_pairs(subject)
    x, t, m, p, s = tensors(embeddings, templates, media, pairs, same)
    result, scores = score_templates(*pool_templates(x, t, m), p, s, name="ijb", block=100)
    cosines = np.array([expected[a] @ expected[b] for a, b in pairs])
    np.testing.assert_allclose(scores.numpy(), cosines, atol=1e-6)
    false_accepts, true_accepts, _ = roc_curve(same, cosines, drop_intermediate=False)
    assert int((~same).sum()) == 1740
    for key, far in (("1e-1", 0.1), ("1e-2", 0.01), ("1e-3", 0.001)):
        best = true_accepts[false_accepts <= far].max()
        threshold = result.thresholds[f"tar@{key}"]
        assert threshold is not None
        near = int((abs(cosines[same] - threshold) < 2e-5).sum())  # what a bin may move
        assert abs(result.figures[f"tar@{key}"] - best) <= (near + 0.01) / same.sum()  # type: ignore[operator]
        assert (cosines[~same] >= threshold + 1e-6).mean() <= far
    assert result.figures["tar@1e-4"] is None and result.figures["tar@1e-6"] is None
    assert 0 < result.figures["tar@1e-3"] < result.figures["tar@1e-1"] < 1  # type: ignore[operator]
    assert result.counts == {"templates": 60, "genuine": 30, "impostor": 1740, "left out": 0}


def test_shares_of_ranks_add_up_to_one_rank():
    embeddings, templates, media, _, subject = some_images()
    x, t, m, p, s = tensors(embeddings, templates, media, *all_pairs(subject))
    ids, pooled = pool_templates(x, t, m)
    alone, scores = score_templates(ids, pooled, p, s, name="ijb")
    parts: list[list[Tensor]] = []
    for rank in range(3):
        mine: list[Tensor] = []
        score_templates(
            ids,
            pooled,
            p,
            s,
            name="ijb",
            block=50,
            rank=rank,
            world=3,
            reduce=lambda x, mine=mine: mine.append(x.clone()) or x,
        )
        parts.append(mine)
    sums = iter([torch.stack(each).sum(0) for each in zip(*parts, strict=True)])
    result, together = score_templates(ids, pooled, p, s, name="ijb", rank=2, world=3, reduce=lambda _: next(sums))
    assert result == alone and torch.equal(together, scores)


def test_a_pair_of_a_template_that_is_gone_is_left_out():
    embeddings, templates, media, _, subject = some_images()
    x, t, m, p, s = tensors(embeddings, templates, media, *all_pairs(subject))
    gone = int(t[0])
    kept = t != gone
    result, scores = score_templates(*pool_templates(x[kept], t[kept], m[kept]), p, s, name="ijb")
    assert (
        result.counts == {"templates": 59, "genuine": 29, "impostor": 1682, "left out": 59}
        and "59 pairs" in result.summary()
    )
    assert torch.equal(scores.isnan(), (p == gone).any(1))
    whole, _ = score_templates(
        *pool_templates(x[kept], t[kept], m[kept]), p[~scores.isnan()], s[~scores.isnan()], name="ijb"
    )
    assert whole.figures == result.figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": torch.ones(3, 3, dtype=torch.int64)}, "do not match"),
        ({"same": torch.ones(2, dtype=torch.bool)}, "do not match"),
        ({"same": torch.ones(3, dtype=torch.bool)}, "no pair of two identities"),
        ({"embeddings": torch.full((4, 2), torch.inf)}, "not finite"),
        ({"ids": torch.zeros(0, dtype=torch.int64), "embeddings": torch.zeros(0, 2)}, "no pair of one identity"),
    ],
)
def test_bad_input_is_a_user_error(change, message):
    given = {
        "ids": torch.arange(4),
        "embeddings": torch.ones(4, 2),
        "pairs": torch.tensor([[0, 1], [1, 2], [2, 3]]),
        "same": torch.tensor([True, False, True]),
        **change,
    }
    with pytest.raises(UserError, match=message):
        score_templates(**given, name="ijb")


# ---------------------------------------------------------------------------------------------------- files

GOOD = "a.jpg 5 1\nb.jpg 5 1\n\nc.jpg -7 2\n"


def test_lists_are_read(tmp_path):
    (tmp_path / "tid").write_text(GOOD)
    (tmp_path / "pairs").write_text("5 -7 0\n5 5 1\n")
    (tmp_path / "points").write_text("b.jpg 1 2 3 0.5\na.jpg 4 5 6 0.25\nc.jpg 0 1\nd.jpg 0 9\n")
    listed = read_templates(tmp_path / "tid")
    assert listed.names == ["a.jpg", "b.jpg", "c.jpg"]
    assert (listed.templates.tolist(), listed.media.tolist()) == ([5, 5, -7], [1, 1, 2])
    pairs, same = read_pairs(tmp_path / "pairs", listed.templates)
    assert (pairs.tolist(), same.tolist()) == ([[5, -7], [5, 5]], [False, True])
    assert read_detector_scores(tmp_path / "points", listed.names).tolist() == [0.25, 0.5, 1]


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        ("tid", "a.jpg 5 1\nb.jpg 5\n", "line 2: give an image name, a template id and a media id"),
        ("tid", "a.jpg x 1\n", "line 1: give an image name"),
        ("tid", "", "are empty"),
        ("tid", None, "cannot be read"),
        ("tid", b"\xff\xfe\xff", "it is not a text file"),
        ("pairs", "5 -7 0\n5 8 1\n", "line 2: template 8 has no image in the list of templates"),
        ("pairs", "9 -7 0\n", "line 1: template 9 has no image"),
        ("pairs", "5 -7 2\n", "line 1: give two template ids and 1 or 0"),
        ("pairs", "5 -7\n", "line 1: give two template ids"),
        ("points", "a.jpg 0.1\n", "no line for the image b.jpg (and 1 others)"),
        ("points", "a.jpg good\n", "line 1: give an image name and numbers"),
        ("points", "a.jpg 1\nb.jpg nan\n", "line 2: 'b.jpg nan' has a non-finite number"),
        ("points", "a.jpg 1\nb.jpg 1\nc.jpg -inf 1\n", "line 3: 'c.jpg -inf 1' has a non-finite number"),
        ("points", "a.jpg\n", "line 1: there are 0 numbers after the image name"),
    ],
)
def test_a_list_that_is_none_is_a_user_error(which: str, text: str | bytes | None, message: str, tmp_path: Path):
    files = {"tid": GOOD.encode(), "pairs": b"5 -7 0\n", "points": b"a.jpg 1\nb.jpg 1\nc.jpg 1\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if text is None:
        (tmp_path / which).unlink()
    else:
        (tmp_path / which).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        listed = read_templates(tmp_path / "tid")
        read_pairs(tmp_path / "pairs", listed.templates)
        read_detector_scores(tmp_path / "points", listed.names)
    assert message in str(caught.value) and which in str(caught.value)


@pytest.mark.parametrize("size", [112, 56])
def test_faces_are_aligned_by_their_points(size, tmp_path):
    """A picture with a bright blob at each of the five points: turned by 30 degrees, four times as large, shifted; then
    all lie right."""
    angle, scale = np.radians(30), 4.0
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = REFERENCE @ turn.T + (300.0, 60.0)
    y, x = np.mgrid[:700, :800]
    picture = sum(255 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 200) for a, b in points).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "face.png")
    (tmp_path / "points").write_text(f"face.png {' '.join(map(str, points.flatten()))} 0.9\nnone.png {'3 ' * 10}1\n")
    read = read_points(tmp_path / "points", ["face.png", "none.png"])
    images = AlignedImages(tmp_path, ["face.png", "none.png"], read, (1, size, size))
    found = images.load(0)[0].double()
    assert found.shape == (size, size)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for a, b in REFERENCE * size / 112:
        near = found * ((columns - a).abs() < 7 * size / 112) * ((rows - b).abs() < 7 * size / 112)
        centre = (float((near * columns).sum() / near.sum()), float((near * rows).sum() / near.sum()))
        assert centre == (pytest.approx(a, abs=0.4), pytest.approx(b, abs=0.4))
    with pytest.raises(UnreadableImage, match=r"none\.png \(its points are not those of a face"):
        images.load(1)


def test_a_file_of_points_aligns_unless_the_images_are_aligned_already(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "x_face_tid_mid.txt").write_text("a.jpg 5 1\nb.jpg 7 1\n")
    (tmp_path / "x_template_pair_label.txt").write_text("5 7 0\n5 5 1\n")
    (tmp_path / "x_name_5pts_score.txt").write_text(f"a.jpg {'3 ' * 10}0.5\nb.jpg {'3 ' * 10}0.25\n")
    for align, kind in ((True, AlignedImages), (False, ListedImages)):
        (task,) = open_tasks(EvaluationConfig(templates=str(tmp_path), align=align), (3, 8, 8))
        assert isinstance(task, TemplatePairs) and type(task.images) is kind
        assert task.weights is not None and task.weights.tolist() == [0.5, 0.25], "the score weighs either way"
