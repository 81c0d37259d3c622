"""What the works of disks.py read and no command makes: files of ranks, a packed set, fonts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from partial_fc.training.data.fonts.write_set import IMAGES, LABELS, SOURCES
from partial_fc.training.data.formats.packed import write_index


def make(folder: str) -> None:
    base = Path(folder)
    (base / "ranks").mkdir(exist_ok=True)
    for rank in range(2):
        rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(rank))
        torch.save(rows, base / "ranks" / f"rank_{rank}_softmax_weight.pt")
    packed(base / "packed")
    fonts(base / "fonts")


def packed(folder: Path) -> None:
    """Images of 6 identities from 2 sources."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    np.save(folder / IMAGES, generator.integers(0, 255, (48, 1, 32, 32), dtype=np.uint8))
    np.save(folder / LABELS, np.arange(48, dtype=np.int32) % 6)
    np.save(folder / SOURCES, np.arange(48, dtype=np.int32) % 2)
    write_index(folder, [f"id{i}" for i in range(6)], ["one", "two"], {"identities": [], "sources": []}, {})


def fonts(folder: Path) -> None:
    """Those that matplotlib brings."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf"):
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, folder / name)
