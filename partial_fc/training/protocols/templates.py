"""Template verification: IJB-B and IJB-C (Whitelam et al. 2017, Maze et al. 2018).

A template is a set of images and video frames of one identity.

    face_tid_mid.txt         one line per image: name, template id, media id (one media id: frames of one video)
    template_pair_label.txt  one line per pair: template id, template id, 1 or 0
    embeddings [n, D]        one per line, as the backbone gives them: their length is a measure of image quality
      x detector score       optional
      average over the images of a medium, sum over the media, scale to unit length     -> templates [T, D]
      cosine of each pair    in blocks, a contiguous share per rank                     -> scores [P], TAR at FAR

TAR is measured at FAR 1e-6 to 1e-1. There is no figure where the FAR is less than one impostor pair (IJB-C has 15.6
million, so 1e-6 rests on fifteen of them).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from partial_fc.training.errors import UserError
from partial_fc.training.protocols.pairs import BLOCK, LEAST_FALSE_ACCEPTS, Pairs, folds_of, score_pairs
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tiling import Reduce, check_labels, unit_rows

FARS = {f"1e-{k}": 10.0**-k for k in range(6, 0, -1)}
CHUNK = 65536  # images pooled at a time


# ---------------------------------------------------------------------------------------------- lists in text files


@dataclass
class Templates:
    """One entry per image: `names`, template ids `[n]`, media ids `[n]`."""

    names: list[str]
    templates: Tensor
    media: Tensor


def read_templates(path: str | Path) -> Templates:
    """Read lines "name template media" with integer ids. Raises UserError that names the first invalid line."""
    names: list[str] = []
    templates: list[int] = []
    media: list[int] = []
    for number, words in _lines(path, "templates"):
        if len(words) != 3 or not all(map(_is_integer, words[1:])):
            raise UserError(
                f"{path}, line {number}: give an image name, a template id and a media id, not {' '.join(words)!r}"
            )
        names.append(words[0])
        templates.append(int(words[1]))
        media.append(int(words[2]))
    return Templates(names, torch.tensor(templates), torch.tensor(media))


def read_pairs(path: str | Path, templates: Tensor) -> tuple[Tensor, Tensor]:
    """Read lines "template template label" with label 1 or 0; return (template ids `[P, 2]`, same bool `[P]`).

    Raises UserError that names the first invalid line, or the first line with a template that is not in `templates`.
    """
    table = _read_integers(path)
    invalid = ~np.isin(table[:, 2], (0, 1))
    if invalid.any():
        raise _invalid_pair(path, int(invalid.argmax()))
    unknown = ~np.isin(table[:, :2], templates.numpy())
    if unknown.any():
        row = int(unknown.any(1).argmax())
        number, _ = next(itertools.islice(_lines(path, "pairs"), row, None))
        template = table[row, int(unknown[row].argmax())]
        raise UserError(f"{path}, line {number}: template {template} has no image in the list of templates")
    return torch.from_numpy(table[:, :2].copy()), torch.from_numpy(table[:, 2] == 1)


def _read_integers(path: str | Path) -> npt.NDArray[np.int64]:
    """Return the numbers `[P, 3]` of a list of pairs, which may have millions of lines."""
    next(_lines(path, "pairs"))  # raises for a file that is empty or cannot be read
    try:
        table = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None, encoding="utf-8")
    except (ValueError, OverflowError):
        table = np.zeros((0, 0), dtype=np.int64)
    if table.shape[1] != 3:
        lines = enumerate(words for _, words in _lines(path, "pairs"))
        invalid = next(row for row, words in lines if len(words) != 3 or not all(map(_is_integer, words)))
        raise _invalid_pair(path, invalid)
    return table


def _invalid_pair(path: str | Path, row: int) -> UserError:
    number, words = next(itertools.islice(_lines(path, "pairs"), row, None))
    return UserError(f"{path}, line {number}: give two template ids and 1 or 0, not {' '.join(words)!r}")


def read_detector_scores(path: str | Path, names: list[str]) -> Tensor:
    """Return a weight for each of `names`, `[n]`: the last word of the line that begins with the name.

    Raises UserError for a name without a line.
    """
    return torch.tensor([numbers[-1] for numbers in _read_detections(path, names, 1)])


def read_points(path: str | Path, names: list[str]) -> npt.NDArray[np.float64]:
    """Return the five points of each of `names`, `[n, 5, 2]`, from lines "name x y x y x y x y x y score".

    Raises UserError for a name without such a line.
    """
    return np.array([numbers[:10] for numbers in _read_detections(path, names, 11)]).reshape(-1, 5, 2)


def _read_detections(path: str | Path, names: list[str], least: int) -> list[list[float]]:
    """Return, for each of `names`, the numbers of the line that begins with it: at least `least` of them."""
    found: dict[str, list[float]] = {}
    for number, words in _lines(path, "detections"):
        try:
            found[words[0]] = [float(word) for word in words[1:]]
        except ValueError:
            raise UserError(
                f"{path}, line {number}: give an image name and numbers, a score last, not {' '.join(words)!r}"
            ) from None
        if not all(map(math.isfinite, found[words[0]])):
            raise UserError(f"{path}, line {number}: {' '.join(words)!r} has a non-finite number; fix or remove it")
        if len(words) <= least:
            raise UserError(
                f"{path}, line {number}: there are {len(words) - 1} numbers after the image name; give at least {least}"
            )
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{path} has no line for the image {missing[0]} (and {len(missing) - 1} others); every image needs one"
        )
    return [found[name] for name in names]


def _lines(path: str | Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and words of each line that is not blank; raises UserError if there is none."""
    empty = True
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if words:
                    empty = False
                    yield number, words
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"the {what} {path} cannot be read: {reason}") from error
    if empty:
        raise UserError(f"the {what} {path} are empty")


def _is_integer(word: str) -> bool:
    digits = word.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(word) < 19


# ---------------------------------------------------------------------------------------------- pooling and scores


def pool_templates(
    embeddings: Tensor,
    templates: Tensor,
    media: Tensor,
    *,
    weights: Tensor | None = None,
    normalize_images: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pool `embeddings` `[n, D]` of images; return (template ids `[T]` in rising order, unit embeddings `[T, D]`).

    Args:
        templates: the template of each image, ids `[n]`.
        media: the medium of each image, ids `[n]`. The images of one medium within a template are averaged, the media
            are summed.
        weights: factor for the embedding of each image `[n]`, such as a detector's score.
        normalize_images: scale the embeddings of images to unit length first, so that their length has no influence.

    Raises UserError for lengths that differ, or embeddings that are not finite.
    """
    count = len(embeddings)
    unit = unit_rows(embeddings, "image")  # also checks shape and values
    image_rows = unit if normalize_images else embeddings.detach().float()
    templates = check_labels(templates, count, "template")
    media = check_labels(media, count, "media")
    if weights is not None and weights.shape != (count,):
        raise UserError(f"the weights have shape {list(weights.shape)}; give one for each of the {count} images")

    # (template, medium) of each of the M media [M, 2], sorted by template
    template_and_medium, medium_of = torch.stack((templates, media), 1).unique(dim=0, return_inverse=True)
    media_count = len(template_and_medium)
    sizes = torch.bincount(medium_of, minlength=media_count)
    media_rows = torch.zeros(media_count, embeddings.shape[1], device=embeddings.device)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        rows = image_rows[part]
        if weights is not None:
            rows = rows * weights[part, None].to(rows)
        media_rows.index_add_(0, medium_of[part].to(media_rows.device), rows)
    media_rows /= sizes[:, None].to(media_rows)

    ids, template_of = template_and_medium[:, 0].unique(return_inverse=True)
    pooled = torch.zeros(len(ids), embeddings.shape[1], device=embeddings.device)
    pooled.index_add_(0, template_of.to(pooled.device), media_rows)
    return ids, F.normalize(pooled, dim=1)


def score_templates(
    ids: Tensor,
    embeddings: Tensor,
    pairs: Tensor,
    same: Tensor,
    *,
    name: str,
    block: int = BLOCK,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    device: torch.device | None = None,
) -> tuple[Result, Tensor]:
    """Score pairs of templates; return (figures, cosine of each pair `[P]` float32).

    Args:
        ids: template ids `[T]` in rising order, of `embeddings` `[T, D]`, as `pool_templates` returns them.
        pairs: template ids `[P, 2]`.
        same: bool `[P]`, whether the pair is of one identity.

    A pair with a template that is not in `ids` (none of its images could be read) is skipped and counted; its score is
    NaN. `block` pairs are scored at a time, on `device` (default: where the embeddings are). Calls `reduce` three
    times. Figures: "tar@FAR" for FAR from 1e-6 to 1e-1, None where the FAR is less than one impostor pair; "eer".

    Raises UserError for shapes that do not match, embeddings that are not finite, or if pairs of one kind are missing.
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or same.shape != (len(pairs),) or ids.shape != (len(embeddings),):
        raise UserError(
            f"{name}: ids {list(ids.shape)} of embeddings {list(embeddings.shape)}, pairs {list(pairs.shape)} and same "
            f"{list(same.shape)} do not match; give [T], [T, D], [P, 2] and [P]"
        )
    unit = unit_rows(embeddings, "template")
    ids, pairs, same = ids.cpu(), pairs.cpu(), same.cpu()  # numbers; the products are where the embeddings are
    rows = torch.searchsorted(ids, pairs.contiguous()).clamp_(max=max(len(ids) - 1, 0))
    known = (ids[rows] == pairs).all(1) if len(ids) else torch.zeros(len(pairs), dtype=torch.bool)
    kept = known.nonzero().flatten()
    listed = Pairs(
        first=rows[kept, 0],
        second=rows[kept, 1],
        same=same.bool()[kept],
        fold=folds_of(len(pairs))[kept],
    )
    listed.check(name)
    how = {"block": block, "rank": rank, "world": world}
    scored = score_pairs(unit, listed, keep_scores=True, **how, reduce=reduce, device=device)
    assert scored.scores is not None
    scores = torch.full((len(pairs),), torch.nan)
    scores[kept] = scored.scores
    histograms = scored.histograms
    genuine = int(listed.same.sum())
    skipped = len(pairs) - len(kept)
    result = Result(
        protocol="templates",
        name=name,
        counts={"templates": len(ids), "genuine": genuine, "impostor": len(kept) - genuine, "left out": skipped},
        figures={
            **{f"tar@{key}": histograms.tar_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
            "eer": histograms.eer(),
        },
        thresholds={f"tar@{key}": histograms.threshold_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
        notes=[f"{skipped} pairs with a template without readable images were skipped"] if skipped else [],
        curves={"roc": histograms.roc()},
        histograms=histograms.curves(),
    )
    return result, scores
