"""What the quick start reaches: ArcFace against no margin, several seeds, on characters never trained on.

    python benchmarks/glyph_results.py [--seeds 0 1 2] [--epochs 12] [--out runs/glyph_results]

Each run is the quick start itself: `accelerate launch` with two CPU processes. Prints a Markdown table and writes it with the figures of
every run to OUT/results.json; a run that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HEADS = {
    "ArcFace, m = 0.5": ["--head.margin", "arcface"],
    "ArcFace, m = 0.5, r = 0.3": ["--head.margin", "arcface", "--head.sample_rate", "0.3"],
    "NormFace (no margin)": ["--head.margin", "normface"],
}
LAUNCH = ["accelerate", "launch", "--config_file", "configs/accelerate/cpu2.yaml", "-m", "partial_fc", "train", "configs/quickstart.yaml"]


def run(folder: Path, head: list[str], seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """The evaluations of one run by the name of their data set."""
    if not (folder / "metrics.json").exists():
        print(f"running {folder}", file=sys.stderr)
        settings = ["--output.folder", str(folder), "--seed", str(seed), "--train.epochs", str(epochs), *head]
        subprocess.run([*LAUNCH, *settings], check=True, stdout=subprocess.DEVNULL)
    return {e["name"]: e for e in json.loads((folder / "metrics.json").read_text())["evaluations"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/glyph_results"))
    asked = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for name, head in HEADS.items():
        for seed in asked.seeds:
            slug = name.replace(" ", "").replace(",", "-").replace("=", "").replace("(", "-").replace(")", "")
            evaluations = run(asked.out / f"{slug}-seed{seed}", head, seed, asked.epochs)
            for split in ("seen", "new"):
                for far in ("1e-3", "1e-4"):
                    results.setdefault(name, {}).setdefault(f"{split} {far}", []).append(evaluations[split]["tar"][far])
    columns = list(next(iter(results.values())))
    print(f"| head | {' | '.join(f'{c.split()[0]}, TAR @ FAR {c.split()[1]}' for c in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, figures in results.items():
        cells = [f"{statistics.mean(figures[c]):.3f} ({min(figures[c]):.3f}–{max(figures[c]):.3f})" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    (asked.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
