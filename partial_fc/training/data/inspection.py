"""What a data set contains, and what is wrong with it (`partial-fc data inspect`). Every image is read once.

images, identities, images per identity   from the labels
bytes, pixels, kinds                      from the encoded images
unreadable                                images that cannot be decoded, and samples that were skipped
duplicates                                images with the same bytes (128-bit BLAKE2b), within an identity or across
label gaps                                numbers that no image has, if labels are integers
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
from partial_fc.training.files import replacing

SHOWN = 10
PLOT_ENDINGS = {".png": ["Software"], ".svg": ["Date", "Creator"], ".pdf": ["CreationDate", "Creator", "Producer"]}
"""suffix of a plot -> metadata to leave out, so that the same data give the same file"""


@dataclass
class Inspection:
    """What was found in a data set."""

    identity_names: list[str]
    counts: npt.NDArray[np.int64]
    """[C], images of each identity."""
    sizes: npt.NDArray[np.int64]
    """Bytes of every image that could be read."""
    pixels: Counter[tuple[int, int]]
    """How many images have each (width, height)."""
    kinds: Counter[str]
    """How many images have each suffix, such as .jpg."""
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    """Names of images with the same bytes, one list per group."""
    across: int = 0
    """How many of these groups contain several identities."""
    gaps: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return the text for the terminal."""
        low, quarter, median, upper, high = np.percentile(self.counts, [0, 25, 50, 75, 100])
        single = int((self.counts == 1).sum())
        lines = [
            f"identities            {len(self.counts):,}",
            f"images                {int(self.counts.sum()):,}",
            f"images per identity   {low:g} to {high:g}, median {median:g}, middle half {quarter:g} to {upper:g}",
            f"with one image        {single:,} identities" + ("; consider --data.min_images 2" if single else ""),
        ]
        if len(self.sizes):
            kinds = ", ".join(f"{count:,} {kind[1:]}" for kind, count in self.kinds.most_common())
            average, largest = f"{self.sizes.mean():,.0f} bytes on average", f"{self.sizes.max():,} at most"
            lines.append(f"kinds                 {kinds}; {average}, {largest}")
            common = [f"{width} x {height} ({count:,})" for (width, height), count in self.pixels.most_common(3)]
            more = f" and {len(self.pixels) - 3:,} other sizes" if len(self.pixels) > 3 else ""
            lines.append(f"pixels                {', '.join(common)}{more}")
        lines += _listed("unreadable", self.unreadable)
        groups = [" = ".join(group[:4]) + (" = ..." if len(group) > 4 else "") for group in self.duplicates]
        unit = f"group{'s' if len(groups) != 1 else ''}, {self.across:,} of them across identities"
        lines += _listed("duplicate images", groups, unit)
        ranges = _ranges(self.gaps)
        lines += _listed("label gaps", ranges, "range" if len(ranges) == 1 else "ranges")
        lines += [f"note                  {note}" for note in self.notes]
        return "\n".join(lines)


def _listed(what: str, found: Sequence[str], unit: str = "") -> list[str]:
    """Return a line with the number of items, and lines with the first of them."""
    more = [f"  ... and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
    return [
        f"{what:<21} {len(found):,} {unit if found else ''}".rstrip(),
        *(f"  {each}" for each in found[:SHOWN]),
        *more,
    ]


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Return rising integers as text, with runs joined: 3, 5..9."""
    out: list[list[int]] = []
    for number in numbers:
        if out and out[-1][1] == number - 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return [str(low) if low == high else f"{low}..{high}" for low, high in out]


def inspect_data(dataset: IdentityDataset, *, decode: bool = True) -> Inspection:
    """Read all images of a data set; decode them too, or with `decode` False only read their headers.

    Images that are stored as pixels have neither a header nor anything to decode.
    """
    count = len(dataset)
    channels, height, width = dataset.image_shape
    digests = np.zeros((count, 2), dtype=np.uint64)
    sizes = np.zeros(count, dtype=np.int64)
    readable = np.zeros(count, dtype=bool)
    pixels: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    unreadable = list(dataset.skipped)
    scratch = np.empty((height, width, channels), dtype=np.uint8)
    for index in tqdm(range(count), unit="image", desc="reading", mininterval=0.5):
        try:
            data = dataset.content(index)
            digests[index] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype=np.uint64)
            sizes[index] = len(data)
            readable[index] = True
            if isinstance(dataset, EncodedIdentities):
                try:
                    suffix, *size = read_header(data)
                    if decode:
                        decode_into(data, scratch)
                except Exception as error:  # decoders raise almost anything
                    raise dataset.unreadable(index, error) from error
            else:
                suffix, size = ".raw", [width, height]
            kinds[suffix] += 1
            pixels[size[0], size[1]] += 1
        except UnreadableImage as error:
            unreadable.append(str(error))
    found = Inspection(
        dataset.identity_names,
        torch.bincount(dataset.labels, minlength=dataset.num_identities).numpy(),
        sizes[readable],
        pixels,
        kinds,
        unreadable,
        gaps=_gaps(dataset.raw_labels),
        notes=list(dataset.notes),
    )
    for group in _equal_images(digests, readable):
        found.duplicates.append([dataset.name_of(index) for index in group])
        found.across += len({int(dataset.labels[index]) for index in group}) > 1
    return found


def _equal_images(digests: npt.NDArray[np.uint64], readable: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Return the groups of two or more readable images with equal digests [n, 2], in the order of their first image."""
    indices = np.flatnonzero(readable)
    order = indices[np.lexsort((indices, digests[indices, 1], digests[indices, 0]))]
    if not len(order):
        return []
    starts = np.flatnonzero(np.r_[True, (digests[order[1:]] != digests[order[:-1]]).any(axis=1)])
    groups = [group.tolist() for group in np.split(order, starts[1:]) if len(group) > 1]
    return sorted(groups)


def _gaps(labels: Sequence[str]) -> list[int]:
    """Return the integers that are missing between 0 (or the lowest label) and the highest label.

    Returns none if labels are names, or so far apart that they are identifiers rather than a numbering.
    """
    try:
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
    except (ValueError, OverflowError):
        return []
    if not len(numbers) or numbers.max() > 100 * len(numbers) + 1000:
        return []
    return np.setdiff1d(np.arange(min(0, int(numbers.min())), int(numbers.max())), numbers).tolist()


def plot_counts(path: Path, found: Inspection, title: str) -> None:
    """Draw the histogram of images per identity to a file with one of the suffixes `PLOT_ENDINGS`.

    The scale is logarithmic if the largest identity has more than ten times the median.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = found.counts
    high = int(counts.max())
    median = float(np.median(counts))
    logarithmic = high > 10 * max(median, 1)
    if logarithmic:
        edges = [value - 0.5 for value in sorted({round(value) for value in np.geomspace(1, high + 1, 41).tolist()})]
    else:
        width = max(1, -(-(high - int(counts.min()) + 1) // 40))
        edges = [value - 0.5 for value in range(int(counts.min()), high + width + 1, width)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(counts, bins=edges, color="#3b6ea5", edgecolor="white", linewidth=0.5)
    axes.axvline(median, color="#c44e52", linewidth=1.2, label=f"median {median:g}")
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel("images per identity")
    axes.set_ylabel("identities")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{title}: {int(counts.sum()):,} images of {len(counts):,} identities", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120, metadata=dict.fromkeys(PLOT_ENDINGS[path.suffix]))
