"""What sampling costs and saves at 40,000 identities and more: the same run with all classes and with a share of them
as negatives.

    launch/glyphs                                                                       the data set, once
    python benchmarks/glyphs_large.py [--data data/glyphs] [--rates 1.0 0.3 0.1] [--steps N] [--out runs/glyphs-large]

Every rate has the same data, backbone, order of images, number of steps and ranks (two processes of this machine); it
is verified on characters never trained on, in the designs of training (seen) and in others (new). To OUT go table.md,
results.json, glyphs_large.png, and a run folder with a report for each rate; a rate that is finished there is not run
again. Memory is private memory of a rank (resident less shared), looked at five times a second while it trains and
evaluates; the mapped pictures are not in it. A step's seconds contain all that a step does, loading too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from partial_fc.training.data import DataConfig, open_data  # noqa: E402
from partial_fc.training.run import METRICS  # noqa: E402

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "configs/accelerate/cpu2.yaml"),
    "-m",
    "partial_fc",
]
FARS = ("1e-3", "1e-4")
COLORS = {"seen": "#0072B2", "new": "#D55E00"}


def peak_private_memory(process: subprocess.Popen[bytes]) -> float:
    """Wait for the launcher; the most that any of its ranks held privately, in MiB."""
    peak = 0
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        for child in launcher.children(recursive=True):
            try:
                memory = child.memory_info()
            except psutil.Error:  # it has just ended
                continue
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.2)
    return peak / 2**20


def run(rate: float, asked: argparse.Namespace, images: int) -> dict[str, Any]:
    """The figures of one rate, from its folder if it is finished there."""
    folder = asked.out / f"r{rate:g}"
    kept = folder / "figures.json"
    settings = [asked.identities, asked.steps, asked.batch_size]
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        if found["settings"] != settings:
            raise SystemExit(f"{folder} was run with other settings; remove it or give another --out")
        return found
    shutil.rmtree(folder, ignore_errors=True)
    epochs, rest = divmod(asked.steps, images // asked.batch_size)
    if rest:
        raise SystemExit(
            f"--steps {asked.steps} is no whole number of epochs; give a multiple of {images // asked.batch_size}"
        )
    command = [*LAUNCH, "train", str(ROOT / "configs/quickstart.yaml"), "--data.folder", str(asked.data)]
    command += [
        "--data.identities",
        str(asked.identities),
        "--head.sample_rate",
        str(rate),
        "--train.epochs",
        str(epochs),
    ]
    command += [
        "--train.batch_size",
        str(asked.batch_size),
        "--optimizer.lr",
        str(asked.lr),
        "--output.folder",
        str(folder),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        peak = peak_private_memory(process)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise SystemExit(f"the run with r = {rate:g} failed; see above")
    metrics = json.loads((folder / METRICS).read_text())
    figures: dict[str, Any] = {
        "rate": rate,
        "settings": settings,
        "identities": metrics["training"]["identities"],
        "images": metrics["training"]["images"],
        "steps": metrics["training"]["steps"],
        "seconds_per_step": metrics["training"]["seconds"] / metrics["training"]["steps"],
        "peak_private_mib": peak,
        "sets": {
            e["name"]: {**{far: e["tar"][far] for far in FARS}, "rank1": e["rank1"]} for e in metrics["evaluations"]
        },
    }
    kept.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def table(rows: Sequence[dict[str, Any]]) -> str:
    sets = list(rows[0]["sets"])
    names = [
        f"{each}, {'rank-1' if figure == 'rank1' else f'TAR @ FAR {figure}'}"
        for each in sets
        for figure in (*FARS, "rank1")
    ]
    lines = [f"| r | {' | '.join(names)} | seconds a step | peak memory of a rank |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [_share(row["sets"][each][figure]) for each in sets for figure in (*FARS, "rank1")]
        lines.append(
            f"| {row['rate']:g} | {' | '.join(cells)} | {row['seconds_per_step']:.3f} | {row['peak_private_mib']:,.0f} MiB |"
        )
    first = rows[0]
    budget = f"{first['identities']:,} identities, {first['images']:,} images, {first['steps']:,} steps of {first['settings'][2]}, 2 ranks."
    return "\n".join(lines) + f"\n\n{budget}\n"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the rate on the left, what a step costs on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.1), layout="constrained")
    accuracy, cost = figure.subplots(1, 2)
    rates = [row["rate"] for row in rows]
    for each, color in COLORS.items():
        for line, key, name in (("-", "1e-3", "TAR @ FAR 1e-3"), ("--", "rank1", "rank-1")):
            values = [row["sets"].get(each, {}).get(key) for row in rows]
            if None not in values:
                accuracy.plot(rates, values, f"o{line}", color=color, label=f"{each}: {name}")
    accuracy.set(
        xlabel="sample rate r", ylabel="share", title="on identities never trained on", xscale="log", xticks=rates
    )
    accuracy.set_xticklabels([f"{rate:g}" for rate in rates])
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    places = range(len(rows))
    cost.bar([place - 0.2 for place in places], [row["seconds_per_step"] for row in rows], 0.4, color="#0072B2")
    cost.set(xlabel="sample rate r", title="cost", xticks=list(places), xticklabels=[f"{rate:g}" for rate in rates])
    cost.set_ylabel("seconds a step", color="#0072B2")
    memory = cost.twinx()
    memory.bar([place + 0.2 for place in places], [row["peak_private_mib"] for row in rows], 0.4, color="#E69F00")
    memory.set_ylabel("peak private memory of a rank, MiB", color="#B97E00")
    for axes in (accuracy, cost):
        axes.grid(color="0.9", axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/glyphs"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--identities", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=None, help="whole epochs of steps (default: one epoch)")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs-large"))
    asked = parser.parse_args(arguments)
    asked.data, asked.out = asked.data.absolute(), asked.out.absolute()
    images = len(open_data(DataConfig(folder=str(asked.data), identities=asked.identities), 0).train)
    asked.steps = asked.steps or images // asked.batch_size
    asked.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for rate in asked.rates:
        print(f"== r = {rate:g}: {asked.steps:,} steps", file=sys.stderr)
        rows.append(run(rate, asked, images))
        (asked.out / "table.md").write_text(table(rows))
        (asked.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
        plot(rows, asked.out / "glyphs_large.png")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
