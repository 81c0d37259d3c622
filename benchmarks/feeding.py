"""How fast images are fed: 112 x 112 JPEG through decode, flip, normalise, collate, from every format, beside
DataLoader over Pillow.

    python benchmarks/feeding.py [--quick] [--images 4096] [--batch_size 128] [--workers 0] [--formats recordio folder]

One process, one thread, in turn, each the whole data set in shuffled batches; files are in the page cache:

    ours          BatchLoader over the format, mirrored with probability ½
    DataLoader    torch.utils.data.DataLoader over the folder: Pillow, to RGB, to float, (x − ½) / ½, mirrored with
                  probability ½ one by
                  one; the default collate

The pictures are made here: smooth colour with noise, quality 90, about as many bytes as crops of faces have. Images a
second are of processor time; with --workers, of time on the clock, since the work is in other processes. Ratios are of
neighbours in time. The table is on standard output.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from ranks import interleaved, over_ranks, ratio, run_ranks  # noqa: E402

from partial_fc.training.data import open_source  # noqa: E402
from partial_fc.training.data.augment import AugmentConfig  # noqa: E402
from partial_fc.training.data.convert import FORMATS, convert  # noqa: E402
from partial_fc.training.data.loader import BatchLoader  # noqa: E402

SIZE, PER_IDENTITY = 112, 8
MARK = 2.0  # times the DataLoader, at least
FLIP = AugmentConfig(
    rotation=0.0, translation=0.0, scale_min=1.0, scale_max=1.0, shear=0.0, flip_probability=0.5, blur_probability=0.0,
    contrast=0.0, brightness=0.0, erase_probability=0.0, noise_std=0.0,
)  # fmt: skip


class Pillow(Dataset[tuple[Tensor, int]]):
    """What one writes without thinking much of it: root/identity/picture, an item a picture."""

    def __init__(self, root: Path) -> None:
        folders = sorted(root.iterdir())
        self.items = [(str(path), label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        tensor.sub_(0.5).div_(0.5)
        return (tensor.flip(2) if torch.rand(()) < 0.5 else tensor), label


def write_pictures(root: Path, count: int) -> float:
    """A folder of `count` pictures; their mean size in bytes."""
    rng, total = np.random.default_rng(0), 0
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=90)
        path = root / f"{number // PER_IDENTITY:06d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
        total += len(out.getvalue())
    return total / count


def walk(batches: Iterable[Any], count: int) -> Callable[[], None]:
    def run() -> None:
        seen = 0
        for batch in batches:
            images = batch.images if hasattr(batch, "images") else batch[0]
            assert images.dtype == torch.float32 and images.shape[1:] == (3, SIZE, SIZE) and images.is_contiguous()
            seen += len(images)
        assert seen == count

    return run


def feeding_times(
    folder: str, formats: list[str], batch_size: int, workers: int, repetitions: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall, cpu) seconds of every pass, by format; in one process."""
    pictures = Pillow(Path(folder) / "folder")
    loader: DataLoader[Any] = DataLoader(pictures, batch_size=batch_size, shuffle=True, num_workers=workers)
    things = {"DataLoader": walk(loader, len(pictures))}
    for name in formats:
        dataset = open_source(Path(folder) / name, SIZE, 3, format=name)  # type: ignore[arg-type]
        batches = BatchLoader(dataset, batch_size=batch_size, augment=FLIP, drop_last=False, workers=workers)
        things[name] = walk(batches, len(dataset))
    return interleaved(things, repetitions, warm_up=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that it runs")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="processes that load, of both")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.images, asked.batch_size, asked.repetitions = 64, 16, 1
    with tempfile.TemporaryDirectory() as folder:
        size = write_pictures(Path(folder) / "folder", asked.images)
        source = open_source(Path(folder) / "folder")
        for name in asked.formats:
            if name != "folder":
                convert(source, Path(folder) / name, name)
        taken = run_ranks(1, feeding_times, folder, asked.formats, asked.batch_size, asked.workers, asked.repetitions)
    times = over_ranks(taken)

    def seconds(name: str) -> list[float]:
        return times[name].wall if asked.workers else times[name].cpu

    unit = f"on the clock, {asked.workers} workers" if asked.workers else "and core"
    print(f"\n{asked.images:,} pictures of {SIZE} x {SIZE}, {size:,.0f} bytes each, batches of {asked.batch_size}\n")
    print(f"| fed from | images a second {unit} | over DataLoader with Pillow | wanted, at least |\n|---|---|---|---|")
    for name in (*asked.formats, "DataLoader"):
        middle = sorted(seconds(name))[len(seconds(name)) // 2]
        over = "1" if name == "DataLoader" else f"{ratio(seconds('DataLoader'), seconds(name)):.2f}"
        print(f"| {name} | {asked.images / middle:,.0f} | {over} | {'' if name == 'DataLoader' else MARK:} |")


if __name__ == "__main__":
    main()
