"""Resident memory of the ranks over a soak (soak.py): does it grow?

    look       every SECONDS, of each rank that trains: when, which process, its resident memory and the part of it that
               is its own (not pages of files, such as class rows in files and libraries)
    settled    samples from WARM seconds after the first step that the process has seen, up to the last step of the run:
               not imports, not the first buffers, not the evaluation
    growth     of a process, from the first third of its settled samples to the last; of the soak, from the medians of
               the first third of its processes to those of the last

Memory is counted in MiB. A run of the soak saves every ten steps, and has thousands of steps in an hour: whatever is not
given back once a step (a batch of images, the gradients) or once a save (a copy of all weights) would be hundreds of
MiB. What an allocator keeps for itself is not the same twice, and comes to some MiB. LIMIT lies between.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import psutil
from soak_run import Watch

SECONDS, WARM = 1.0, 5.0
LEAST = 9  # settled samples of a process of which a growth is told
LIMIT = 32.0  # MiB that a process, or the soak, may grow
COLOURS = {0: "#1f6f8b", 1: "#d68910"}

Sample = tuple[float, str, int, int, float, float]  # seconds, run, rank, pid, resident, own
Life = list[Sample]  # the settled samples of one process


class Memory:
    """The samples of a soak. samples: those that are there already."""

    def __init__(self, samples: list[Any] | None = None) -> None:
        self.samples: list[Sample] = [tuple(each) for each in samples or []]
        self._next = 0.0
        self._settled: dict[int, float] = {}  # from when on a process' samples count

    def look(
        self, ranks: dict[int, psutil.Process], watch: Watch, seconds: float, run: str, last: int | None = None
    ) -> None:
        """Sample the ranks, if it is time. seconds: since the soak began. last: the last step of the run."""
        now = time.monotonic()
        if now < self._next or (last is not None and watch.step >= last):
            return
        self._next = now + SECONDS
        for rank, process in ranks.items():
            with contextlib.suppress(psutil.Error):
                if process.pid not in self._settled:
                    age = time.time() - process.create_time()
                    if watch.step and now - watch.moved < age:  # a step was logged in its life
                        self._settled[process.pid] = now + WARM
                elif now > self._settled[process.pid] and process.status() != psutil.STATUS_ZOMBIE:
                    found = process.memory_info()
                    resident, own = found.rss / 2**20, (found.rss - found.shared) / 2**20
                    self.samples.append((seconds, run, rank, process.pid, resident, own))

    def drop(self, run: str, watch: Watch, began: float) -> None:
        """Forget what was sampled of a run after its last step, where its last step was not known before."""
        last = watch.moved - began
        self.samples = [each for each in self.samples if each[1] != run or each[0] < last]

    def lives(self, rank: int) -> list[Life]:
        """The settled samples of each process of a rank that has enough, in the order of time."""
        of: dict[tuple[str, int], Life] = {}
        for each in self.samples:
            if each[2] == rank:
                of.setdefault((each[1], each[3]), []).append(each)
        return [life for life in of.values() if len(life) >= LEAST]

    def figures(self) -> list[dict[str, Any]]:
        """Of each rank: how many processes, their most memory, the most that one grew, what the soak grew."""
        found = []
        for rank in sorted({each[2] for each in self.samples}):
            lives = self.lives(rank)
            figures: dict[str, Any] = {"rank": rank, "processes": len(lives)}
            mine = [each for each in self.samples if each[2] == rank]
            for name, column in (("resident", 4), ("own", 5)):
                medians = [statistics.median(each[column] for each in life) for life in lives]
                longest = max(lives, key=lambda life: life[-1][0] - life[0][0], default=[])
                figures[name] = {
                    "most": max(each[column] for each in mine),
                    "of a process": max((_growth([each[column] for each in life]) for life in lives), default=None),
                    "of the longest": _growth([each[column] for each in longest]) if longest else None,
                    "over the soak": _growth(medians) if len(medians) > 2 else None,
                }
                figures["longest"] = longest[-1][0] - longest[0][0] if longest else 0.0
            found.append(figures)
        return found

    def problems(self) -> list[str]:
        """What grew by more than LIMIT. Nothing looked at is a problem as well."""
        figures = self.figures()
        if len(figures) < 2 or not any(each["processes"] for each in figures):
            return ["the memory of the ranks was not looked at for long enough"]
        return [
            f"rank {each['rank']}: its memory ({kind}) has grown by {each[kind][of]:.0f} MiB {words}, more than {LIMIT:.0f}"
            for each in figures
            for kind in ("resident", "own")
            for of, words in (("of a process", "in the life of a process"), ("over the soak", "over the soak"))
            if each[kind][of] is not None and each[kind][of] > LIMIT
        ]

    def table(self) -> str:
        """A row a rank and kind of memory."""
        heads = (
            "memory, MiB", "processes", "most", "most that one grew", "that with the longest life", "over the soak"
        )  # fmt: skip
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for each in self.figures():
            for kind in ("resident", "own"):
                grown = [each[kind][of] for of in ("of a process", "of the longest", "over the soak")]
                words = ["–" if figure is None else f"{figure:+.1f}" for figure in grown]
                words[1] += f" in {each['longest']:.0f} s"
                cells = [f"rank {each['rank']}, {kind}", each["processes"], f"{each[kind]['most']:.0f}", *words]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + f"\n\nA growth of more than {LIMIT:.0f} MiB is a problem.\n"

    def plot(self, axes: Any) -> None:
        """The resident memory of every process that settled, over time."""
        for rank, colour in COLOURS.items():
            for number, life in enumerate(self.lives(rank)):
                when = [each[0] / 60 for each in life]
                label = f"rank {rank}" if not number else None
                axes.plot(when, [each[4] for each in life], color=colour, linewidth=1.2, label=label)
                axes.plot(when, [each[5] for each in life], color=colour, linewidth=0.8, linestyle=":")
        axes.set(xlabel="minutes since the soak began", ylabel="MiB", ylim=(0, None))
        axes.set_title("Resident memory (dotted: without pages of files)")
        axes.legend(loc="lower right", fontsize=8)


def _growth(figures: list[float]) -> float:
    """Of the median, from the first third to the last."""
    third = max(1, len(figures) // 3)
    return statistics.median(figures[-third:]) - statistics.median(figures[:third])
