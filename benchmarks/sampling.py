"""What sampled classes cost in accuracy, and what wins it back: the same training with all classes and with a share of
them as negatives, by what happens to the rows that a step skips.

    launch/glyphs                                            the data set, once
    python benchmarks/sampling.py [--data data/glyphs] [--seeds 0 1 2] [--only 'dense-*' ...] [--minutes 120]
    python benchmarks/sampling.py --large                    72,000 characters, and 100,000 names of places

The grid: 20,000 characters, four epochs of 357 steps of 512 on two CPU ranks, the quick start's settings with a
learning rate of 0.2, verified on characters never trained on, in the designs of training (seen) and in others (new).
The cases that decide come first, each over all seeds. Names of places are those of examples/place_names.py.

After every run OUT/table.md, OUT/results.json and OUT/sampling*.png are written anew, of all that is finished there.
Started again, it goes on: a finished run is not run again, an interrupted one is resumed from its last epoch. A folder
that was run with other settings is refused. --minutes begins no run that would end later, by the longest one so far.

The grid takes many hours. --known is the results.json of parts that were run elsewhere: a run that it has, with these
settings, is not run again and stands in the tables too; if not given, benchmarks/results/sampling.json if it is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import sampling_places
import sampling_report
from losses import check_settings, train

from partial_fc.training.errors import UserError
from partial_fc.training.run import METRICS, RunFolder

FARS = ("1e-3", "1e-4")
RANKS = 2  # of configs/accelerate/cpu2.yaml
FIGURES = "figures.json"
OF_QUICKSTART = Path("quickstart")
KNOWN = Path(__file__).parent / "results" / "sampling.json"


@dataclass(frozen=True)
class Method:
    """What is done about classes that are not drawn. settings: of the application; {lr} is the learning rate."""

    title: str
    settings: str = ""


_STILL, _DENSE = "--head_skipped_rows still", "--head_skipped_rows dense"
_IMPORTANCE = "--head.sampling_correction importance"
_NO_MOMENTUM = "--head_optimizer SGD --head_optimizer.lr {lr10:g} --head_optimizer.weight_decay 0.0005"
_NO_DECAY = "--head_optimizer SGD --head_optimizer.lr {lr:g} --head_optimizer.momentum 0.9"
METHODS = {
    "all": Method("all classes"),
    "dense": Method("dense", _DENSE),
    "still": Method("still", _STILL),
    "importance": Method("dense, importance", f"{_DENSE} {_IMPORTANCE}"),
    "hard": Method(
        "dense, importance, 4 hard negatives",
        f"{_DENSE} {_IMPORTANCE} --head.hard_negatives 4 --head.hard_negatives_every 100",
    ),
    "still_importance": Method("still, importance", f"{_STILL} {_IMPORTANCE}"),
    "dense_no_momentum": Method("dense, rows without momentum, 10 × lr", f"{_DENSE} {_NO_MOMENTUM}"),
    "still_no_momentum": Method("still, rows without momentum, 10 × lr", f"{_STILL} {_NO_MOMENTUM}"),
    "dense_no_decay": Method("dense, rows without weight decay", f"{_DENSE} {_NO_DECAY}"),
    "still_no_decay": Method("still, rows without weight decay", f"{_STILL} {_NO_DECAY}"),
    "block16": Method("dense, blocks of 16 classes", f"{_DENSE} --head.sample_block 16"),
    "block128": Method("dense, blocks of 128 classes", f"{_DENSE} --head.sample_block 128"),
    "bf16": Method("dense, rows in bfloat16", f"{_DENSE} --head.dtype bfloat16"),
    **{
        f"row_wise{lr}": Method(
            f"RowWiseAdagrad, rate {lr}",
            f"--head_optimizer RowWiseAdagrad --head_optimizer.lr {lr} --head_optimizer.weight_decay 0",
        )
        for lr in ("0.005", "0.02", "0.08")
    },
    "still_lr2": Method("still, rows with 2 × lr", f"{_STILL} --head_lr_factor 2"),
    "still_lr5": Method("still, rows with 5 × lr", f"{_STILL} --head_lr_factor 5"),
}


@dataclass(frozen=True)
class Case:
    """A row of a table: a set (glyphs, large or places), a method and a sample rate."""

    data: str
    method: str
    rate: float

    @property
    def name(self) -> str:
        return f"{'' if self.data == 'glyphs' else f'{self.data}-'}{self.method}-r{self.rate:g}"

    @property
    def title(self) -> str:
        return f"r = {self.rate:g}, {METHODS[self.method].title}"


DECIDING = [("all", 1.0), ("dense", 0.1), ("dense", 0.02), ("still", 0.1), ("still", 0.02)]
GRID = [
    *DECIDING,
    ("dense", 0.005),
    ("still", 0.005),
    *((method, rate) for method in ("importance", "hard", "still_importance") for rate in (0.1, 0.02, 0.005)),
    *((f"{kind}_no_{part}", 0.1) for part in ("momentum", "decay") for kind in ("dense", "still")),
    *((f"still_lr{factor}", rate) for rate in (0.1, 0.02) for factor in (2, 5)),
    *((f"block{block}", rate) for rate in (0.1, 0.02) for block in (16, 128)),
    ("bf16", 0.1),
    *((f"row_wise{lr}", 0.1) for lr in ("0.005", "0.02", "0.08")),
]
CASES = [Case("glyphs", *each) for each in GRID]
LARGE_CASES = [Case(data, *each) for data in ("large", "places") for each in DECIDING]


@dataclass
class Run:
    """One case and seed, in a folder of its own."""

    case: Case
    seed: int
    asked: argparse.Namespace

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.asked.out / f"{self.case.name}-seed{self.seed}")

    @property
    def finished(self) -> bool:
        return (self.folder.path / FIGURES).is_file() or self.known is not None

    @property
    def known(self) -> dict[str, Any] | None:
        """Its figures from elsewhere, if there are any of these settings."""
        figures: dict[str, Any] | None = self.asked.known_runs.get((self.case.name, self.seed))
        return figures if figures is not None and figures["settings"] == self.settings else None

    @property
    def settings(self) -> dict[str, Any]:
        """What its figures depend on, beside case and seed."""
        asked = self.asked
        if self.case.data == "places":
            return vars(self.of_places)
        identities = asked.large_identities if self.case.data == "large" else asked.identities
        data = "quickstart" if asked.data == OF_QUICKSTART else "glyphs"
        of_training = {name: getattr(asked, name) for name in ("epochs", "batch_size", "lr")}
        return {"data": data, "identities": identities, **of_training}

    @property
    def arguments(self) -> list[str]:
        """Settings of the application."""
        asked, case = self.asked, self.case
        folder = [] if asked.data == OF_QUICKSTART else ["--data.folder", str(asked.data)]
        common = {
            "--data.identities": self.settings["identities"],
            "--head.sample_rate": case.rate,
            "--train.epochs": asked.epochs,
            "--train.batch_size": asked.batch_size,
            "--train.keep_last": 1,
            "--optimizer.lr": asked.lr,
            "--seed": self.seed,
            "--output.folder": self.folder.path,
        }
        own = METHODS[case.method].settings.format(lr=asked.lr, lr10=10 * asked.lr)
        return [*folder, *(str(part) for pair in common.items() for part in pair), *own.split()]

    @property
    def of_places(self) -> sampling_places.Settings:
        """Settings of a run on names of places."""
        skipped = None if self.case.method == "all" else self.case.method
        asked = self.asked
        return sampling_places.Settings(self.case.rate, skipped, self.seed, asked.places, asked.place_epochs)

    def check(self) -> None:
        """UserError if the folder holds a run with other settings."""
        folder = self.folder.path
        if self.case.data == "places":
            figures = folder / FIGURES
            if figures.is_file() and json.loads(figures.read_text())["settings"] != self.settings:
                raise UserError(f"{folder} was run with other settings; remove it or give another --out")
        else:
            check_settings(self.folder, self.arguments)

    def start(self) -> None:
        """Train and evaluate; the bars of the run are on standard error."""
        folder = self.folder.path
        if self.case.data == "places":
            figures = sampling_places.run(self.of_places, RANKS)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            if not (folder / METRICS).exists():
                train(self.folder, self.arguments)
            figures = self._figures()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / FIGURES).write_text(json.dumps({"settings": self.settings, **figures}, indent=2) + "\n")

    def _figures(self) -> dict[str, Any]:
        """What the run left, in the form of `sampling_report`."""
        metrics = json.loads((self.folder.path / METRICS).read_text())
        training = metrics["training"]
        logged = [row for row in self.folder.history() if "selected_rows" in row]

        def mean(name: str, otherwise: float) -> float:
            return statistics.fmean(row[name] for row in logged) if logged else otherwise

        return {
            "identities": training["identities"],
            "samples": training["images"],
            "steps": training["steps"],
            "batch_size": self.asked.batch_size,
            "seconds_per_step": training["seconds"] / training["steps"],
            "rows": mean("selected_rows", training["identities"] / RANKS),
            "shares": [mean("window_share", 1.0), mean("batch_share", 0.0), mean("hard_share", 0.0)],
            "sets": {
                each["name"]: {
                    **{f"TAR @ FAR {far}": each["tar"][far] for far in FARS},
                    "rank-1": each["rank1"],
                }
                for each in metrics["evaluations"]
            },
        }


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is finished of these runs, a row a case, with the figures by seed; the largest sample rate first."""
    rows: dict[Case, dict[str, Any]] = {}
    methods = list(METHODS)
    for run in sorted(runs, key=lambda run: (-run.case.rate, methods.index(run.case.method), run.seed)):
        case, own = run.case, run.folder.path / FIGURES
        figures = json.loads(own.read_text()) if own.is_file() else run.known
        if figures is not None:
            method = METHODS[case.method]
            row = {"data": case.data, "name": case.name, "method": method.title, "rate": case.rate}
            of_case = rows.setdefault(case, {**row, "settings": method.settings, "seeds": {}})
            of_case["seeds"][run.seed] = figures
    return list(rows.values())


def known_runs(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The figures in a results.json, by case and seed; none if there is no such file."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    return {(row["name"], int(seed)): figures for row in rows for seed, figures in row["seeds"].items()}


def write(asked: argparse.Namespace) -> str:
    """Write tables, figures and plots of what is finished with these settings; return the tables."""
    out = asked.out
    rows = results([Run(case, seed, asked) for case in (*CASES, *LARGE_CASES) for seed in asked.seeds])
    if not rows:
        return ""
    out.mkdir(parents=True, exist_ok=True)
    text = sampling_report.tables(rows)
    (out / "table.md").write_text(text)
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    for data in dict.fromkeys(row["data"] for row in rows):
        name = "sampling.png" if data == "glyphs" else f"sampling_{data}.png"
        sampling_report.plot([row for row in rows if row["data"] == data], out / name)
    return text


def _asked(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data/glyphs"), help="or quickstart, its 1,000 characters, for a first look"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    parser.add_argument("--known", type=Path, default=KNOWN, help="results.json of runs that are not to be run again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, or patterns such as 'dense-*'; --list")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, in their order, and end")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--large", action="store_true", help="the two larger sets in place of the grid")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--identities", type=int, default=20_000)
    parser.add_argument("--large_identities", type=int, default=72_000)
    parser.add_argument("--places", type=int, default=100_000)
    parser.add_argument("--place_epochs", type=int, default=2)
    asked = parser.parse_args(arguments)
    asked.out = asked.out.absolute()
    asked.known_runs = known_runs(asked.known)
    if asked.data != OF_QUICKSTART:
        asked.data = asked.data.absolute()
    return parser, asked


def main(arguments: Sequence[str] | None = None) -> None:
    parser, asked = _asked(arguments)
    cases = LARGE_CASES if asked.large else CASES
    if asked.only:
        cases = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in asked.only)]
        if not cases:
            parser.error(f"--only {' '.join(asked.only)}: no case has such a name; --list prints them")
    if asked.list:
        print("\n".join(case.name for case in cases))
        return
    runs = [Run(case, seed, asked) for case in cases for seed in asked.seeds]
    try:
        for run in runs:
            run.check()
    except UserError as error:
        parser.error(str(error))
    left = [run for run in runs if not run.finished]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished in {asked.out}", file=sys.stderr)
    began, longest = time.monotonic(), 0.0
    for done, run in enumerate(left):
        before = time.monotonic()
        if asked.minutes is not None and done and (before - began + longest) / 60 > asked.minutes:
            print(f"{len(left) - done} runs are left; the same command goes on", file=sys.stderr)
            break
        print(f"== {done + 1} of {len(left)}: {run.case.name}, {run.case.title}, seed {run.seed}", file=sys.stderr)
        run.start()
        longest = max(longest, time.monotonic() - before)
        write(asked)
    print(write(asked), end="")


if __name__ == "__main__":
    main()
