"""Template verification: IJB-B and IJB-C (Whitelam et al. 2017, Maze et al. 2018), a template being several images and video frames.

    face_tid_mid.txt         a line an image: image name, template id, media id (images of one media id are frames of one video)
    template_pair_label.txt  a line a pair: template id, template id, 1 or 0
    embeddings [n, D]        of each line's image, as the backbone gives them: their length is a measure of quality
      x detector score       optional
      mean over the images of a medium, sum over the media of a template, unit length   -> templates [T, D]
      cosine of each pair    in blocks, a contiguous share for each rank               -> scores [P], TAR at FAR 1e-6 ... 1e-1

A FAR of less than one impostor pair has no figure (IJB-C has 15.6 million, so that 1e-6 rests on fifteen).
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
CHUNK = 65536  # images that are pooled at a time


@dataclass
class Templates:
    """A line an image: `names`, template ids `[n]`, media ids `[n]`."""

    names: list[str]
    templates: Tensor
    media: Tensor


def read_templates(path: str | Path) -> Templates:
    """The images of templates: lines "name template media", ids being integers. UserError that names the line that is none."""
    names, templates, media = [], [], []
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
    """(template ids `[P, 2]`, same bool `[P]`) of lines "template template label", label 1 or 0.

    UserError that names the line that is none, or that has a template which is not among the ids `templates`.
    """
    table = _integers(path)
    wrong = ~np.isin(table[:, 2], (0, 1))
    if wrong.any():
        raise _no_pair(path, int(wrong.argmax()))
    unknown = ~np.isin(table[:, :2], templates.numpy())
    if unknown.any():
        row = int(unknown.any(1).argmax())
        number, _ = next(itertools.islice(_lines(path, "pairs"), row, None))
        template = table[row, int(unknown[row].argmax())]
        raise UserError(f"{path}, line {number}: template {template} has no image in the file of templates")
    return torch.from_numpy(table[:, :2].copy()), torch.from_numpy(table[:, 2] == 1)


def _integers(path: str | Path) -> npt.NDArray[np.int64]:
    """The numbers `[P, 3]` of a file of pairs, which may have millions of lines."""
    next(_lines(path, "pairs"))  # refuses what cannot be read, and what is empty
    try:
        table = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None, encoding="utf-8")
    except (ValueError, OverflowError):
        table = np.zeros((0, 0), dtype=np.int64)
    if table.shape[1] != 3:
        lines = enumerate(words for _, words in _lines(path, "pairs"))
        raise _no_pair(path, next(row for row, words in lines if len(words) != 3 or not all(map(_is_integer, words))))
    return table


def _no_pair(path: str | Path, row: int) -> UserError:
    number, words = next(itertools.islice(_lines(path, "pairs"), row, None))
    return UserError(f"{path}, line {number}: give two template ids and 1 or 0, not {' '.join(words)!r}")


def read_detector_scores(path: str | Path, names: list[str]) -> Tensor:
    """A weight for each of `names` `[n]`: the last word of the line that begins with the name. UserError for a name without a line."""
    return torch.tensor([words[-1] for words in _detected(path, names, 1)])


def read_points(path: str | Path, names: list[str]) -> npt.NDArray[np.float64]:
    """The five points `[n, 5, 2]` of each of `names`: lines "name x y x y x y x y x y score". UserError for a name without such a line."""
    return np.array([words[:10] for words in _detected(path, names, 11)]).reshape(-1, 5, 2)


def _detected(path: str | Path, names: list[str], least: int) -> list[list[float]]:
    """For each of `names`, the numbers of the line that begins with it, at least so many."""
    found: dict[str, list[float]] = {}
    for number, words in _lines(path, "detections"):
        try:
            found[words[0]] = [float(word) for word in words[1:]]
        except ValueError:
            raise UserError(
                f"{path}, line {number}: give an image name and numbers, a score last, not {' '.join(words)!r}"
            ) from None
        if not all(map(math.isfinite, found[words[0]])):
            raise UserError(
                f"{path}, line {number}: {' '.join(words)!r} has a number that is not finite; mend or remove it"
            )
        if len(words) <= least:
            raise UserError(
                f"{path}, line {number}: there are {len(words) - 1} numbers after the image name; there must be {least}"
            )
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{path} has no line for the image {missing[0]} (and {len(missing) - 1} others); every image needs one"
        )
    return [found[name] for name in names]


def _lines(path: str | Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of each line that has any."""
    some = False
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if words:
                    some = True
                    yield number, words
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the {what} {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}"
        ) from error
    if not some:
        raise UserError(f"the {what} {path} are empty")


def _is_integer(word: str) -> bool:
    return word.removeprefix("-").isascii() and word.removeprefix("-").isdigit() and len(word) < 19


def pool_templates(
    embeddings: Tensor,
    templates: Tensor,
    media: Tensor,
    *,
    weights: Tensor | None = None,
    normalize_images: bool = False,
) -> tuple[Tensor, Tensor]:
    """(template ids `[T]`, rising; their embeddings `[T, D]` at unit length) from `embeddings` `[n, D]` of images.

    templates, media: ids of each image `[n]`; the images of one medium within a template are averaged, the media are summed. weights: what
    each image is multiplied with `[n]`, such as a detector's score. normalize_images: at unit length first, so that the embeddings' own
    length does not weigh. Raises UserError for lengths that differ, or embeddings that are not finite.
    """
    count, unit = len(embeddings), unit_rows(embeddings, "image")  # refuses what is no matrix of numbers
    if not normalize_images:
        unit = embeddings.detach().float()
    templates, media = check_labels(templates, count, "template"), check_labels(media, count, "media")
    if weights is not None and weights.shape != (count,):
        raise UserError(f"{list(weights.shape)} weights for {count} images; give one for each")
    both, medium_of = torch.stack((templates, media), 1).unique(
        dim=0, return_inverse=True
    )  # [M, 2], sorted by template
    sizes = torch.bincount(medium_of, minlength=len(both))
    summed = torch.zeros(len(both), embeddings.shape[1], device=embeddings.device)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        rows = unit[part] if weights is None else unit[part] * weights[part, None].to(unit)
        summed.index_add_(0, medium_of[part].to(summed.device), rows)
    summed /= sizes[:, None].to(summed)
    ids, template_of = both[:, 0].unique(return_inverse=True)
    pooled = torch.zeros(len(ids), embeddings.shape[1], device=embeddings.device).index_add_(
        0, template_of.to(summed.device), summed
    )
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
) -> tuple[Result, Tensor]:
    """(figures; the cosine of each pair `[P]` float32, NaN where a template is not among `ids`) of templates.

    ids: template ids `[T]`, rising, of `embeddings` `[T, D]`, as `pool_templates` gives them; pairs: template ids `[P, 2]`; same: bool
    `[P]`. A pair of a template that is not there (none of its images could be read) is left out and counted. `block` pairs are scored at a
    time; three calls of `reduce`. Figures: "tar@FAR", FAR from 1e-6 to 1e-1, None where it is less than one impostor pair; "eer".

    Raises UserError for shapes that do not match, embeddings that are not finite, or no pair of either kind.
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or same.shape != (len(pairs),) or ids.shape != (len(embeddings),):
        raise UserError(
            f"{name}: ids {list(ids.shape)} of embeddings {list(embeddings.shape)}, pairs {list(pairs.shape)} and same "
            f"{list(same.shape)} do not match: give [T], [T, D], [P, 2] and [P]"
        )
    unit = unit_rows(embeddings, "template")
    rows = torch.searchsorted(ids, pairs.contiguous()).clamp_(max=max(len(ids) - 1, 0))
    kept = ((ids[rows] == pairs).all(1) if len(ids) else torch.zeros(len(pairs), dtype=torch.bool)).nonzero().flatten()
    listed = Pairs(rows[kept, 0], rows[kept, 1], same.bool()[kept], folds_of(len(pairs))[kept])
    listed.check(name)
    found = score_pairs(unit, listed, keep_scores=True, block=block, rank=rank, world=world, reduce=reduce)
    assert found.scores is not None
    scores = torch.full((len(pairs),), torch.nan)
    scores[kept] = found.scores
    genuine, left_out = int(listed.same.sum()), len(pairs) - len(kept)
    histograms = found.histograms
    result = Result(
        protocol="templates",
        name=name,
        counts={"templates": len(ids), "genuine": genuine, "impostor": len(kept) - genuine, "left out": left_out},
        figures={f"tar@{key}": histograms.tar_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()}
        | {"eer": histograms.eer()},
        thresholds={f"tar@{key}": histograms.threshold_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
        notes=[f"{left_out} pairs with a template of which no image can be read were left out"] if left_out else [],
        curves={"roc": histograms.roc()},
        histograms=histograms.curves(),
    )
    return result, scores
