"""How much has to be read to follow one training step: the files that a profile of it enters, and their lines.

    PYTHONPATH=.:tests/support python tests/core/test_path_of_a_step.py      prints the table of docs/design.md

The step is the usual one: sampled ArcFace on two ranks, forward, backward, clipping and update, after a step that has
made all state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch
from runner import Ranks

import partial_fc
from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_

PACKAGE = Path(partial_fc.__file__).parent
MOST_FILES, MOST_LINES = 22, 2700
MISSED_STEPS, MOST_OF_THEM = ("optim/skipped_rows.py", "optim/moves.py"), 350  # lines; counted apart


def files_of_a_step(rank: int, world: int) -> list[str]:
    """Files of the package, relative to it, whose code runs in the second step."""
    backbone = torch.nn.Linear(8, 6)
    head = PartialFC(6, 50, ArcFace(scale=16.0), sample_rate=0.2)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        images, labels = torch.randn(4, 8, generator=generator), torch.randint(0, 50, (4,), generator=generator)
        head(backbone(images), labels).backward()
        clip_grad_norm_(backbone.parameters(), head, max_norm=5.0)
        optimizer.step()
        head_optimizer.step()
        optimizer.zero_grad()
        head_optimizer.zero_grad()

    step()
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        entered.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return sorted(str(Path(name).relative_to(PACKAGE)) for name in entered if name.startswith(str(PACKAGE)))


def table(files: list[str]) -> list[tuple[str, int]]:
    """(file, lines), and the sum of them last."""
    rows = [(name, len((PACKAGE / name).read_text().splitlines())) for name in files]
    return [*rows, (f"{len(files)} files", sum(lines for _, lines in rows))]


def files_of_all_ranks() -> list[str]:
    """Of ranks that have done nothing else: an exact head with a RowOptimizer has all steps of optimizers looked at."""
    pool = Ranks(2)
    try:
        return sorted(set().union(*pool.run(files_of_a_step)))
    finally:
        pool.stop()


def test_a_step_is_read_in_one_sitting():
    files = files_of_all_ranks()
    assert "head.py" in files
    assert "optim/row_optimizer.py" in files
    missed = [name for name in files if name in MISSED_STEPS]
    (*_, (_, of_missed)), (*_, (_, lines)) = table(missed), table([name for name in files if name not in missed])
    assert len(files) <= MOST_FILES, files
    assert lines <= MOST_LINES, table(files)
    assert of_missed <= MOST_OF_THEM, table(missed)


if __name__ == "__main__":
    for name, lines in table(files_of_all_ranks()):
        print(f"| {name} | {lines:,} |")
