"""What each loss reaches in the quick start's training: the same data, backbone, steps and seeds, verified on
characters never trained on.

    python benchmarks/losses.py [--seeds 0 1 2] [--epochs 12] [--only NAME ...] [--out runs/losses]

Each run is the quick start itself: `accelerate launch` with two CPU processes, a minute on two free cores. After every
run the table of all that are finished is written to OUT/table.md, with the figures to OUT/results.json and a plot to
OUT/losses.png. Started again, it goes on: finished runs are taken from OUT, an interrupted one is resumed. A folder
that was run with other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from partial_fc.training.cli.main import train_parser  # noqa: E402
from partial_fc.training.config import check_resumes, to_config  # noqa: E402
from partial_fc.training.errors import UserError  # noqa: E402
from partial_fc.training.run import CONFIG, METRICS, RunFolder  # noqa: E402

QUICKSTART = str(ROOT / "configs/quickstart.yaml")
TWO_RANKS = str(ROOT / "configs/accelerate/cpu2.yaml")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_RANKS, "-m", "partial_fc"]
SPLITS = {"seen": "#0072B2", "new": "#D55E00"}  # and their colours
FARS = ("1e-3", "1e-4")
STILL = "--head_skipped_rows still"  # sampling.py compares what may become of skipped rows
Figures = dict[str, dict[str, float]]  # split -> figure -> value


@dataclass
class Loss:
    """A row of the table: what it is called and what it sets beyond configs/quickstart.yaml (scale 32, SGD with lr
    0.1)."""

    title: str
    settings: str


# Settings other than the papers' (but for the scale) were chosen by one look at seed 0; docs/losses.md says which and
# why.
PLAIN = "--head.margin Softmax"
LOSSES = {
    "softmax": Loss("softmax", PLAIN),
    "softmax-center": Loss("softmax + center loss", f"{PLAIN} --center.weight 0.003"),
    "normface": Loss("NormFace (no margin)", "--head.margin NormFace"),
    "sphereface": Loss("SphereFace", "--head.margin SphereFace"),
    "cosface": Loss("CosFace", "--head.margin CosFace"),
    "arcface": Loss("ArcFace", "--head.margin ArcFace"),
    "arcface-r0.5": Loss("ArcFace, r = 0.5, still", f"--head.margin ArcFace --head.sample_rate 0.5 {STILL}"),
    "arcface-r0.3": Loss("ArcFace, r = 0.3, still", f"--head.margin ArcFace --head.sample_rate 0.3 {STILL}"),
    "arcface-r0.1": Loss("ArcFace, r = 0.1, still", f"--head.margin ArcFace --head.sample_rate 0.1 {STILL}"),
    "arcface-center": Loss("ArcFace + center loss", "--head.margin ArcFace --center.weight 0.1"),
    "subcenter": Loss("sub-center ArcFace, K = 3", "--head.margin SubCenterArcFace"),
    "curricular": Loss("CurricularFace", "--head.margin CurricularFace"),
    "adaface": Loss("AdaFace", "--head.margin AdaFace --head.margin.momentum 0.1"),
    "magface": Loss("MagFace", "--head.margin MagFace"),
    "elastic": Loss("ElasticFace-Arc", "--head.margin ElasticFace"),
    "sphereface2": Loss("SphereFace2", "--head.margin SphereFace2 --optimizer.lr 1.0 --head_lr_factor 10"),
}


def check_settings(folder: RunFolder, arguments: Sequence[str]) -> None:
    """UserError if the folder holds a run with other settings than the quick start with these arguments."""
    saved = folder.path / CONFIG
    if saved.exists():
        now, before = (to_config(train_parser(), ["--config", *c]) for c in ([QUICKSTART, *arguments], [str(saved)]))
        check_resumes(now, before, str(folder.path))


def train(folder: RunFolder, arguments: Sequence[str]) -> None:
    """Run the quick start with these arguments, or go on with it; its bars are on standard error."""
    if folder.newest_checkpoint():
        command = ["train", "--resume", str(folder.path)]
    else:  # nothing there, or a run that did not reach its first checkpoint
        shutil.rmtree(folder.path, ignore_errors=True)
        command = ["train", QUICKSTART, *arguments]
    subprocess.run([*LAUNCH, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


@dataclass
class Run:
    """One loss and seed, in a folder of its own."""

    name: str
    seed: int
    epochs: int
    out: Path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.out / f"{self.name}-epochs{self.epochs}-seed{self.seed}")

    @property
    def arguments(self) -> list[str]:
        own = ["--output.folder", str(self.folder.path), "--seed", str(self.seed), "--train.epochs", str(self.epochs)]
        return [*own, *LOSSES[self.name].settings.split()]

    @property
    def finished(self) -> bool:
        return (self.folder.path / METRICS).exists()

    def check(self) -> None:
        """UserError if the folder holds a run with other settings."""
        check_settings(self.folder, self.arguments)

    def start(self) -> None:
        """Train and evaluate; the bars of the run are on standard error."""
        train(self.folder, self.arguments)

    def figures(self) -> Figures:
        """TAR at both FARs and rank-1 by split."""
        evaluations = json.loads((self.folder.path / METRICS).read_text())["evaluations"]
        return {e["name"]: {**{far: e["tar"][far] for far in FARS}, "rank1": e["rank1"]} for e in evaluations}


def results(seeds: Sequence[int], epochs: int, out: Path) -> dict[str, dict[str, Any]]:
    """What is finished, by name: the settings, and the figures by seed."""
    found: dict[str, dict[str, Any]] = {}
    for name, loss in LOSSES.items():
        runs = {seed: Run(name, seed, epochs, out) for seed in seeds}
        figures = {str(seed): run.figures() for seed, run in runs.items() if run.finished}
        if figures:
            found[name] = {"title": loss.title, "settings": loss.settings, "epochs": epochs, "seeds": figures}
    return found


def _values(row: dict[str, Any], split: str, figure: str) -> list[float]:
    return [seed[split][figure] for seed in row["seeds"].values()]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Mean and range over the seeds."""
    columns = [(split, figure) for split in SPLITS for figure in (*FARS, "rank1")]
    names = [f"{split}, {'rank-1' if figure == 'rank1' else f'TAR @ FAR {figure}'}" for split, figure in columns]
    lines = [f"| loss | {' | '.join(names)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for row in found.values():
        of_columns = [_values(row, *column) for column in columns]
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f}–{max(v):.3f})" for v in of_columns]
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {len(row['seeds'])} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A row a loss: a point a seed, a diamond for their mean."""
    from matplotlib.figure import Figure

    rows = list(found.values())
    figure = Figure(figsize=(11, 1.5 + 0.34 * len(rows)), layout="constrained")
    for axes, far in zip(figure.subplots(1, len(FARS), sharey=True), FARS, strict=True):
        for split, color in SPLITS.items():
            for place, row in enumerate(rows):
                values = _values(row, split, far)
                axes.plot(values, [place] * len(values), "o", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
                label = f"{split}: a dot a seed, a diamond for their mean" if not place else None
                axes.plot(
                    statistics.mean(values), place, "D", color=color, markersize=6, markeredgecolor="white", label=label
                )
        axes.set_xlabel(f"TAR @ FAR {far}")
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def write(seeds: Sequence[int], epochs: int, out: Path) -> str:
    """The table, the figures and the plot of what is finished; the table."""
    found = results(seeds, epochs, out)
    if not found:
        return ""
    (out / "table.md").write_text(table(found))
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    plot(found, out / "losses.png")
    return table(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(LOSSES), default=list(LOSSES), metavar="NAME", help=", ".join(LOSSES)
    )
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    asked = parser.parse_args(arguments)
    out = asked.out.absolute()
    runs = [Run(name, seed, asked.epochs, out) for seed in asked.seeds for name in asked.only]
    try:
        for run in runs:
            run.check()
    except UserError as error:
        parser.error(str(error))
    left = [run for run in runs if not run.finished]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished in {out}", file=sys.stderr)
    began = time.monotonic()
    for done, run in enumerate(left):
        minutes = (
            f", about {(time.monotonic() - began) / done * (len(left) - done) / 60:.0f} minutes left" if done else ""
        )
        print(f"== {done + 1} of {len(left)}: {LOSSES[run.name].title}, seed {run.seed}{minutes}", file=sys.stderr)
        run.start()
        write(asked.seeds, asked.epochs, out)
    print(write(asked.seeds, asked.epochs, out), end="")


if __name__ == "__main__":
    main()
