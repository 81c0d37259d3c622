"""A gallery answers as plain loops over all images do, however it came to hold them; and says what it cannot enrol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Answer, Enrolment, Gallery, changes, enrolment

Images = tuple[np.ndarray, list[str]]


def images(
    identities: int, each: int = 3, width: int = 16, seed: int = 0, noise: float = 0.5, start: int = 0
) -> Images:
    """(embeddings of all lengths, names) of noisy images, in no order."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((identities, 1, width))
    rows = (centres + noise * rng.standard_normal((identities, each, width))).reshape(-1, width)
    rows *= rng.uniform(0.1, 30, (len(rows), 1))
    names = [f"id{start + place // each:03d}" for place in range(len(rows))]
    order = rng.permutation(len(rows))
    return rows[order].astype(np.float32), [names[place] for place in order]


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_loops(enrolled: Images, queries: np.ndarray, k: int, mode: str) -> list[list[tuple[str, float]]]:
    """Each query against each identity, in float64."""
    rows, names = enrolled
    of = {name: unit(rows[[place for place, each in enumerate(names) if each == name]]) for name in names}
    answers = []
    for query in unit(queries):
        scores = []
        for name, own in of.items():
            score = unit(own.sum(0)) @ query if mode == "mean" else max(float(row @ query) for row in own)
            scores.append((name, float(score)))
        answers.append(sorted(scores, key=lambda pair: -pair[1])[:k])
    return answers


def assert_answers(held: Gallery, enrolled: Images, k: int = 4, seed: int = 9) -> None:
    """The gallery answers as loops over the images `enrolled` do, and knows their identities."""
    queries = np.random.default_rng(seed).standard_normal((20, enrolled[0].shape[1])).astype(np.float32)
    queries = np.concatenate((queries, enrolled[0][:20]))
    wanted = by_loops(enrolled, queries, k, held.per_identity)
    for answer, best in zip(held.search(queries, k), wanted, strict=True):
        assert [match.identity for match in answer.matches] == [name for name, _ in best]
        np.testing.assert_allclose([match.cosine for match in answer.matches], [c for _, c in best], atol=2e-6)
    assert sorted(held.identities) == sorted(set(enrolled[1])) and len(held) == len(set(enrolled[1]))


def built(folder: Path, enrolled: Images, **options: object) -> Gallery:
    return Gallery.build(folder, *enrolled, backbone="b" * 32, **options)  # type: ignore[arg-type]


def both(*parts: Images) -> Images:
    return np.concatenate([rows for rows, _ in parts]), [name for _, names in parts for name in names]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(params=["mean", "all"])
def mode(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("k", [1, 4, 100])
def test_a_search_equals_loops_over_all_images(tmp_path, mode, k):
    enrolled = images(30)
    held = built(tmp_path / "g", enrolled, per_identity=mode)
    assert held.rows == (30 if mode == "mean" else 90)
    assert_answers(held, enrolled, k)
    assert_answers(Gallery.open(tmp_path / "g"), enrolled, k)


def test_one_identity_with_most_of_the_images_does_not_hide_the_others(tmp_path):
    """The nearest 200 rows are all of one identity."""
    near, far = images(1, each=200, noise=0.05), images(5, each=1, seed=1, start=1)
    held = built(tmp_path / "g", both(near, far), per_identity="all")
    assert_answers(held, both(near, far), k=3)


def test_nobody_is_the_answer_below_the_threshold_and_of_an_empty_gallery(tmp_path):
    enrolled = images(5)
    held = built(tmp_path / "g", enrolled)
    (best,) = held.search(enrolled[0][:1], 1)
    assert held.threshold is None and not best.nobody and best.identity == enrolled[1][0]
    cosine = best.matches[0].cosine
    for threshold, found in ((cosine - 1e-3, True), (cosine, True), (min(1.0, cosine + 1e-3), False)):
        held.set_threshold(threshold)
        (answer,) = held.search(enrolled[0][:1], 1)
        assert answer.nobody is not found and answer.identity == (enrolled[1][0] if found else None)
        assert answer.matches[0].identity == enrolled[1][0], "what was nearest is told all the same"
    held.set_threshold(None)
    held.remove(set(enrolled[1]))
    assert len(held) == 0 and held.rows == 0
    assert held.search(enrolled[0][:2], 3) == [Answer([], None)] * 2
    assert all(answer.nobody and answer.identity is None for answer in held.search(enrolled[0][:2]))
    assert held.search(np.empty((0, 16), np.float32)) == []
    assert Gallery.open(tmp_path / "g").identities == []
    held.add(*enrolled)
    assert_answers(held, enrolled)


def test_pictures_and_thumbnails_come_with_the_row_that_matched(tmp_path, mode):
    rows = np.eye(4, dtype=np.float32)
    held = Gallery.build(
        tmp_path / "g",
        rows,
        ["a", "b", "a", "c"],
        pictures=["a0.png", None, "a1.png", "c.png"],
        thumbnails=[None, b"of b", b"of a", None],
        backbone="b",
        per_identity=mode,  # type: ignore[arg-type]
    )
    (match,) = held.search(rows[2:3], 1)[0].matches
    assert match.identity == "a" and match.picture == ("a0.png" if mode == "mean" else "a1.png")
    assert held.thumbnail(match.row) == b"of a"
    (match,) = held.search(rows[1:2], 1)[0].matches
    assert (match.identity, match.picture, held.thumbnail(match.row)) == ("b", None, b"of b")
    held.remove(["b"])
    assert held.thumbnail(match.row) is None and held.thumbnail(10**6) is None


# ---------------------------------------------------------------------------------------------------- changing


def test_identities_that_come_and_go_leave_what_is_enrolled(tmp_path, mode):
    """Many small changes, merges of segments among them."""
    parts = [images(4, seed=seed, start=4 * seed) for seed in range(12)]
    held = built(tmp_path / "g", parts[0], per_identity=mode)
    other = Gallery.open(tmp_path / "g")
    for part in parts[1:]:
        held.add(*part)
    assert len(held.manifest.segments) <= 5
    assert_answers(held, both(*parts))
    gone = {"id000", "id013", "id014", "id015", "id047"}
    held.remove(gone)
    held.remove([f"id{place:03d}" for place in range(20, 40)])
    kept = [place for place, name in enumerate(both(*parts)[1]) if name not in gone and not "id020" <= name < "id040"]
    left = both(*parts)[0][kept], [both(*parts)[1][place] for place in kept]
    assert_answers(held, left)
    assert_answers(other, left)
    assert_answers(Gallery.open(tmp_path / "g"), left)
    assert set(content(tmp_path / "g")) == {"gallery.json"} | held.manifest.files, "no file is left over"


def test_more_images_of_an_identity_extend_or_replace_it(tmp_path, mode):
    first, second = images(6, seed=1), images(8, each=2, seed=2)
    held = built(tmp_path / "g", first, per_identity=mode)
    before = content(tmp_path / "g")
    with pytest.raises(UserError, match=r"'id\d+' and 5 more are enrolled in .* already; .* --existing extend"):
        held.add(*second)
    assert content(tmp_path / "g") == before
    held.add(*second, existing="extend")
    assert_answers(held, both(first, second))
    held.add(*first, existing="replace")
    rest = [place for place, name in enumerate(second[1]) if name in ("id006", "id007")]
    assert_answers(held, both(first, (second[0][rest], [second[1][place] for place in rest])))


def test_enrolments_of_one_identity_may_come_in_parts(tmp_path, mode, monkeypatch):
    monkeypatch.setattr(enrolment, "BATCH", 7)
    enrolled = images(10)
    parts = [Enrolment(enrolled[0][a : a + 8], enrolled[1][a : a + 8]) for a in range(0, 30, 8)]
    held = Gallery.build_from(tmp_path / "g", iter(parts), dimension=16, backbone="b", per_identity=mode)
    assert_answers(held, enrolled)
    held.add_from(iter(parts), existing="replace")
    assert_answers(held, enrolled)


def test_what_is_not_enrolled_cannot_be_removed(tmp_path):
    held = built(tmp_path / "g", images(3))
    before = content(tmp_path / "g")
    with pytest.raises(UserError, match=r"'id9' and 1 more are not enrolled in .*; nothing was removed"):
        held.remove(["id001", "id9", "x"])
    assert content(tmp_path / "g") == before


# ---------------------------------------------------------------------------------------------------- codes


def test_codes_are_made_when_there_are_many_rows_and_again_when_there_are_many_more(tmp_path, mode, monkeypatch):
    monkeypatch.setattr(changes, "FLAT_BELOW", 100)
    monkeypatch.setattr(changes, "GROWTH", 2)
    each = 1 if mode == "mean" else 3
    parts = [images(90 // each, each, seed=seed, start=seed * 90) for seed in range(6)]
    held = built(tmp_path / "g", parts[0], per_identity=mode)
    assert held.manifest.codes is None and held.index == "exact search among 90 embeddings"
    other = Gallery.open(tmp_path / "g")
    made = []
    for place, part in enumerate(parts[1:], start=2):
        held.add(*part)
        made.append(held.manifest.codes)
        for each_one in (held, other):
            assert each_one.rows == 90 * place
            monkeypatch.setattr(each_one._loaded.index, "candidates", 10**6)  # so that nothing is missed
            assert_answers(each_one, both(*parts[:place]))
    assert [codes.rows for codes in made] == [180, 180, 360, 360, 360]
    assert made[0].size == 2 and "by codes of 2 bytes" in held.index and made[0].recall >= 0.99
    gone = sorted(set(parts[2][1]))[:20]
    held.remove(gone)
    kept = [place for place, name in enumerate(both(*parts)[1]) if name not in gone]
    left = both(*parts)[0][kept], [both(*parts)[1][place] for place in kept]
    for each_one in (held, other, Gallery.open(tmp_path / "g")):
        assert len(each_one) == len(set(left[1]))
        monkeypatch.setattr(each_one._loaded.index, "candidates", 10**6)
        assert_answers(each_one, left)


@pytest.mark.parametrize("width", [1, 3, 8, 50])
def test_codes_find_what_an_exact_search_finds(tmp_path, width):
    """Embeddings of any width; far fewer candidates than rows."""
    enrolled = images(700, each=2, width=width, noise=0.3)
    held = built(tmp_path / "codes", enrolled, index="codes", per_identity="all")
    exact = built(tmp_path / "exact", enrolled, index="exact", per_identity="all")
    assert exact.manifest.codes is None and held.manifest.codes.candidates < 1400 // 2
    queries = enrolled[0][::7] + np.float32(0.3)
    found, wanted = (each.search(queries, 1) for each in (held, exact))
    same = [abs(a.matches[0].cosine - b.matches[0].cosine) < 1e-5 for a, b in zip(found, wanted, strict=True)]
    assert np.mean(same) >= 0.97


def test_a_query_gets_k_identities_though_one_has_all_the_nearest_rows(tmp_path, monkeypatch):
    near, far = images(1, each=600, noise=0.05), images(50, each=1, seed=1, start=1)
    held = built(tmp_path / "g", both(near, far), index="codes", per_identity="all")
    monkeypatch.setattr(held._loaded.index, "candidates", 64)
    assert all(len(answer.matches) == 51 for answer in held.search(near[0][:3], 100))


# ---------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (np.ones((2, 15)), ["a", "b"], "embeddings have 15 numbers, but the gallery's have 16; use the backbone"),
        (np.ones(16), ["a"], "shape [16]; give numbers [n, D]"),
        (np.full((1, 16), np.nan), ["a"], "number 0 is not finite"),
        (np.array([np.ones(16), np.full(16, np.inf)]), ["a", "b"], "number 1 is not finite"),
        (np.zeros((1, 16)), ["a"], "number 0 is all zeros, so that it has no direction"),
        (np.array([["1"] * 16]), ["a"], "give numbers [n, D]"),
        (np.ones((2, 16)), ["a"], "2 embeddings and 1 identities do not match"),
        (np.ones((2, 16)), ["a", ""], "identity number 1 is ''; give a name"),
        (np.ones((1, 16)), [" \t"], "give a name that is not empty"),
        (np.ones((1, 16)), [7], "identity number 0 is 7"),
        (np.ones((1, 16)), ["a\0b"], "not valid text"),
        (np.ones((1, 16)), ["\udcff"], "not valid text"),
        (np.array([np.ones(16), -np.ones(16)]), ["a", "a"], "the embeddings of 'a' cancel out"),
    ],
)
def test_what_cannot_be_enrolled_is_refused_and_nothing_changes(tmp_path, rows, names, words):
    held = built(tmp_path / "g", images(3))
    before = content(tmp_path / "g")
    with pytest.raises(UserError) as error:
        held.add(rows, names)
    assert words in str(error.value)
    assert content(tmp_path / "g") == before and len(held) == 3


def test_embeddings_of_any_length_are_enrolled(tmp_path):
    """Lengths whose squares overflow or vanish in float32."""
    rows = np.eye(3, dtype=np.float32) * np.array([[1e30], [1e-30], [1.0]], np.float32)
    held = Gallery.build(tmp_path / "g", rows, ["a", "b", "c"], backbone="b")
    assert [answer.identity for answer in held.search(rows, 1)] == ["a", "b", "c"]
    assert all(abs(answer.matches[0].cosine - 1) < 1e-6 for answer in held.search(rows, 1))
    with pytest.raises(UserError, match="queries have 2 numbers"):
        held.search(np.ones((1, 2)))
    with pytest.raises(UserError, match="of the queries, number 1 is all zeros"):
        held.search(np.array([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(UserError, match="k is 0"):
        held.search(rows, 0)


def test_a_gallery_is_made_in_a_free_folder_only(tmp_path):
    enrolled = images(3)
    built(tmp_path / "g", enrolled)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in (("g", "is a gallery already"), ("full", "not empty and no gallery"), ("file", "is a file")):
        with pytest.raises(UserError, match=words):
            built(tmp_path / name, enrolled)
    with pytest.raises(UserError, match="no image to enrol"):
        built(tmp_path / "none", (np.empty((0, 16), np.float32), []))
    built(tmp_path / "none", enrolled)
    for options, words in (({"per_identity": "median"}, "give mean or all"), ({"index": "tree"}, "give auto, exact")):
        with pytest.raises(UserError, match=words):
            built(tmp_path / "other", enrolled, **options)
    with pytest.raises(UserError, match=r"existing is 'merge'; give refuse"):
        Gallery.open(tmp_path / "g").add(*enrolled, existing="merge")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it is a cosine"):
        Gallery.open(tmp_path / "g").set_threshold(float("nan"))


def test_another_backbone_is_refused(tmp_path):
    held = Gallery.build(
        tmp_path / "g",
        *images(3),
        backbone="abc",
        preprocessing={"flip": False, "image_shape": [1, 32, 32]},
        source="runs/a",
    )
    held.check_backbone("abc", 16, {"flip": False, "image_shape": [1, 32, 32]})
    with pytest.raises(UserError, match=r"embeddings of 16 numbers, but the backbone gives 8; .* \(runs/a\)"):
        held.check_backbone("abc", 8)
    with pytest.raises(UserError, match=r"built with another backbone \(abc, now abd\); use that one \(runs/a\)"):
        held.check_backbone("abd", 16)
    with pytest.raises(UserError, match="was built with flip False, but now it is True"):
        held.check_backbone("abc", 16, {"flip": True, "image_shape": [1, 32, 32]})
    assert held.preprocessing["flip"] is False and held.backbone == "abc" and held.dimension == 16
