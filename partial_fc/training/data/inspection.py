"""What is in a data set, and what is wrong with it: every picture is read once.

images, identities, images an identity   of the labels
bytes, pixels, kinds                      of the encoded pictures
unreadable                                what cannot be decoded, or has no label
duplicates                                pictures with the same bytes (128-bit BLAKE2b), within an identity and across identities
label gaps                                numbers that no image has, where labels are numbers
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from partial_fc.training.data.dataset import EncodedIdentities, IdentityDataset, UnreadableImage
from partial_fc.training.data.decode import decode_into, read_header

SHOWN = 10
PLOT_ENDINGS = {".png": ["Software"], ".svg": ["Date", "Creator"], ".pdf": ["CreationDate", "Creator", "Producer"]}
"""ending of a plot -> what is left out of its metadata, so that equal data give equal files"""


@dataclass
class Survey:
    """counts: images of every identity [C]. sizes: bytes of every picture that can be had. pixels: how often (width, height)."""

    identity_names: list[str]
    counts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    pixels: Counter[tuple[int, int]]
    kinds: Counter[str]
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    """Names of pictures with the same bytes, group by group."""
    across: int = 0
    """How many of those groups are of more than one identity."""
    gaps: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """For the terminal."""
        low, quarter, middle, three, high = np.percentile(self.counts, [0, 25, 50, 75, 100])
        lines = [
            f"identities            {len(self.counts):,}",
            f"images                {int(self.counts.sum()):,}",
            f"images an identity    {low:g} at least, {quarter:g} to {three:g} in the middle half (median {middle:g}), {high:g} at most",
            f"with one image        {int((self.counts == 1).sum()):,} identities",
        ]
        if len(self.sizes):
            kinds = ", ".join(f"{count:,} {kind[1:]}" for kind, count in self.kinds.most_common())
            lines.append(
                f"pictures              {kinds}; {self.sizes.mean():,.0f} bytes on average, {self.sizes.max():,} at most"
            )
            common = ", ".join(
                f"{width} x {height} ({count:,})" for (width, height), count in self.pixels.most_common(3)
            )
            lines.append(
                f"pixels                {common}"
                + (f" and {len(self.pixels) - 3:,} other sizes" if len(self.pixels) > 3 else "")
            )
        lines += _listed("unreadable", self.unreadable)
        groups = [" = ".join(group[:4]) + (" = ..." if len(group) > 4 else "") for group in self.duplicates]
        lines += _listed(
            "duplicate pictures",
            groups,
            f"group{'s' if len(groups) != 1 else ''}, {self.across:,} of them across identities",
        )
        ranges = _ranges(self.gaps)
        lines += _listed("label gaps", ranges, "range" if len(ranges) == 1 else "ranges")
        lines += [f"note                  {note}" for note in self.notes]
        return "\n".join(lines)


def _listed(what: str, found: Sequence[str], unit: str = "") -> list[str]:
    more = [f"  ... and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
    return [
        f"{what:<21} {len(found):,} {unit if found else ''}".rstrip(),
        *(f"  {each}" for each in found[:SHOWN]),
        *more,
    ]


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Whole numbers in rising order, neighbours together: 3, 5..9."""
    out: list[list[int]] = []
    for number in numbers:
        if out and out[-1][1] == number - 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return [str(low) if low == high else f"{low}..{high}" for low, high in out]


def survey(dataset: IdentityDataset, *, decode: bool = True) -> Survey:
    """Read all pictures of a data set, and decode them unless `decode` is off: then their headers say whether they are any. Images that are
    kept as pixels are neither."""
    count, (channels, height, width) = len(dataset), dataset.image_shape
    digests = np.zeros((count, 2), dtype=np.uint64)
    sizes, readable = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    pixels: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    unreadable = list(dataset.left_out)
    scratch = np.empty((height, width, channels), dtype=np.uint8)
    for index in tqdm(range(count), unit="image", desc="reading", mininterval=0.5):
        try:
            data = dataset.content(index)
            digests[index] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype=np.uint64)
            sizes[index], readable[index] = len(data), True
            suffix, *size = ".raw", width, height
            if isinstance(dataset, EncodedIdentities):
                try:
                    suffix, *size = read_header(data)
                    if decode:
                        decode_into(data, scratch)
                except Exception as error:  # decoders raise almost anything
                    raise dataset._unreadable(index, error) from error
            kinds[suffix] += 1
            pixels[size[0], size[1]] += 1
        except UnreadableImage as error:
            unreadable.append(str(error))
    found = Survey(
        dataset.identity_names,
        torch.bincount(dataset.labels, minlength=dataset.num_identities).numpy(),
        sizes[readable],
        pixels,
        kinds,
        unreadable,
        gaps=_gaps(dataset.raw_labels),
        notes=list(dataset.notes),
    )
    for group in _same(digests, readable):
        found.duplicates.append([dataset.name_of(index) for index in group])
        found.across += len({int(dataset.labels[index]) for index in group}) > 1
    return found


def _same(digests: npt.NDArray[np.uint64], readable: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Places with equal digests, two and more together, in the order of the first."""
    places = np.flatnonzero(readable)
    order = places[np.lexsort((places, digests[places, 1], digests[places, 0]))]
    if not len(order):
        return []
    new = np.flatnonzero(np.r_[True, (digests[order[1:]] != digests[order[:-1]]).any(axis=1)])
    groups = [group.tolist() for group in np.split(order, new[1:]) if len(group) > 1]
    return sorted(groups)


def _gaps(labels: Sequence[str]) -> list[int]:
    """Numbers between 0 (or the lowest) and the highest that are missing; none where labels are names, or are far apart as numbers of
    people are."""
    try:
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
    except (ValueError, OverflowError):
        return []
    if not len(numbers) or numbers.max() > 100 * len(numbers) + 1000:
        return []
    return np.setdiff1d(np.arange(min(0, int(numbers.min())), int(numbers.max())), numbers).tolist()


def plot_counts(path: Path, found: Survey, title: str) -> None:
    """Histogram of images an identity, with one of `PLOT_ENDINGS`: logarithmic where the largest identity has ten times the median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = found.counts
    high, middle = int(counts.max()), float(np.median(counts))
    wide = high > 10 * max(middle, 1)
    if wide:
        edges = [value - 0.5 for value in sorted({round(value) for value in np.geomspace(1, high + 1, 41).tolist()})]
    else:
        step = max(1, -(-(high - int(counts.min()) + 1) // 40))
        edges = [value - 0.5 for value in range(int(counts.min()), high + step + 1, step)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(counts, bins=edges, color="#3b6ea5", edgecolor="white", linewidth=0.5)
    axes.axvline(middle, color="#c44e52", linewidth=1.2, label=f"median {middle:g}")
    if wide:
        axes.set_xscale("log")
    axes.set_xlabel("images an identity")
    axes.set_ylabel("identities")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{title}: {int(counts.sum()):,} images of {len(counts):,} identities", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata=dict.fromkeys(PLOT_ENDINGS[path.suffix]))
