"""How fast the head is and how much memory it takes: against the matrix products it cannot do without, against others,
against size.

    python benchmarks/head.py [--cases exact sampled ...] [--quick] [--profile] [--out runs/bench]

Starts ranks by itself: gloo processes on the loopback with one thread each, two but for the sweep over ranks. Every
figure is a ratio of things timed in turn in the same processes, the median of several repetitions, or resident memory
of new processes (cases.py says what of). Prints one Markdown table; writes it to OUT/table.md, all raw figures to
OUT/results.json and a plot to OUT/head.png.

The sampled cases (`sampled`, `many`) have two floors of three matrix products. `floor` has the rows that the step
selected: r·C / ranks of the window, and besides them the batch's classes outside it, about (1 − r)·N / ranks. `bare
floor` has exactly r·C / ranks rows, what sampling is asked for; it is the smaller one, and the ratio over it the larger.
In a step the selected rows first make the steps of momentum that they missed (`skipped_rows="dense"`, what RowOptimizer
does by itself); neither floor has that.

`skipped` compares the two things that may become of rows that a step does not select (docs/optimizers.md): dense, the
default, with still.

Other work on the machine disturbs two ranks that wait for each other more than a floor in which neither waits: the
ratio of processor time, given beside that of wall time, does not count waiting. `--quick` shows that all of it runs;
its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import growth
import peers
import report
import torch
from cases import IN_BACKWARD, Work, memory_of_ours, smaller, time_steps
from ranks import over_ranks, ratio, run_ranks

MIB = 1 << 20
Row = dict[str, Any]  # title, unit, value, limit (largest value wanted) or None, note; what else belongs to the case


class Bench:
    """The cases. Each method measures one and returns its rows of the table."""

    def __init__(self, quick: bool, with_profile: bool) -> None:
        self.quick, self.with_profile = quick, with_profile

    def size(self, work: Work) -> Work:
        return smaller(work) if self.quick else work

    def exact(self) -> list[Row]:
        return self._against_floor(1.2, ours=Work(512, 100_000, 512, 1.0))

    def sampled(self) -> list[Row]:
        return self._against_floor(1.4, limit_of_bare=1.3, ours=Work(512, 200_000, 512, 0.1, repetitions=41))

    def many(self) -> list[Row]:
        few = Work(512, 200_000, 128, 0.1, repetitions=61)
        many = replace(few, C=2_000_000, r=0.01)
        return self._against_floor(1.8, limit_of_bare=1.6, limit_of_others=1.3, ours=many, few=few)

    def skipped(self) -> list[Row]:
        still = Work(512, 2_000_000, 128, 0.01, skipped="still", repetitions=61)
        return self._against_floor(1.8, 1.6, 1.1, ours=replace(still, skipped="dense"), still=still)

    def bf16(self) -> list[Row]:
        return self._against_floor(1.8, ours=Work(512, 100_000, 512, 1.0, bf16=True))

    def memory(self) -> list[Row]:
        return self._memory(Work(512, 400_000, 512, 1.0, tiled=True))

    def memory_in_backward(self) -> list[Row]:
        work = Work(512, 400_000, 512, 1.0, tiled=True, in_backward=True)
        if not IN_BACKWARD:
            return [_row(str(work), "MiB", None, 96.0, "this RowOptimizer has no update_in_backward")]
        return self._memory(work)

    def peers(self) -> list[Row]:
        exact, sampled = (
            self.size(Work(512, 100_000, 512, 1.0, repetitions=5)),
            self.size(Work(512, 200_000, 512, 0.1, repetitions=15)),
        )
        return self._peers(exact, list(peers.BUILDERS)) + self._peers(sampled, list(peers.SAMPLING))

    def growth(self) -> list[Row]:
        rows = []
        for name, sweep in growth.measure(self.quick).items():
            note = f"all sizes {sweep['slope_of_all']:.2f}, steepest of two neighbours {sweep['steepest']:.2f}"
            title = f"{'time × processors' if name == 'ranks' else 'time'} against {sweep['against']}"
            rows.append(_row(title, "slope", sweep["slope"], 1.05, note, sweep=name, **sweep))
        return rows

    def _against_floor(
        self, limit: float, limit_of_bare: float = 0.0, limit_of_others: float = 0.0, **works: Work
    ) -> list[Row]:
        """limit_of_bare: over the bare floor, of a sampled case."""
        works = {name: self.size(work) for name, work in works.items()}
        answers = run_ranks(2, time_steps, works, self.with_profile)
        times = over_ranks([answer["times"] for answer in answers])
        first, rows = works["ours"], []
        for name, other, bound in (
            ("ours", "floor", limit),
            *([("ours", "bare floor", limit_of_bare)] if "bare floor" in times else []),
            *(("ours", other, limit_of_others) for other in works if other != "ours"),
        ):
            a, b = times[name], times[other]
            note = (
                f"{a.seconds * 1e3:.1f} ms to {b.seconds * 1e3:.1f}; of processor time {ratio(a.cpu, b.cpu):.2f}, "
                f"of best times {min(a.wall) / min(b.wall):.2f}"
            )
            against = str(works[other]) if other in works else other
            rows.append(_row(f"step at {first} / {against}", "×", ratio(a.wall, b.wall), bound, note))
        rows[0] |= {
            "works": {name: asdict(work) for name, work in works.items()},
            "selected": [answer["selected"] for answer in answers],
            "wall": {name: t.wall for name, t in times.items()},
            "cpu": {name: t.cpu for name, t in times.items()},
            "profiles": answers[0]["profiles"],
        }
        return rows

    def _memory(self, work: Work) -> list[Row]:
        work = self.size(work)
        answers = run_ranks(2, memory_of_ours, work, self.with_profile)
        of_gradient = 0 if work.in_backward else 1
        worst = max(answers, key=lambda a: a["peak"] - a["start"])
        value = worst["peak"] - worst["start"] - worst["held"] - of_gradient * worst["gradient"]
        above = "weights and state" + " and a gradient" * of_gradient
        note = f"weights and state {worst['held'] / MIB:.0f}, a gradient {worst['gradient'] / MIB:.0f}; peak from {worst['peak_from']}"
        row = _row(f"{work}: peak over {above}", "MiB", value / MIB, 96.0, note, work=asdict(work), raw=answers)
        return [row | {"profiles": {"ours": worst.get("profile", [])}}]

    def _peers(self, work: Work, names: list[str]) -> list[Row]:
        there = [name for name in names if not peers.missing(name)]
        times = over_ranks(run_ranks(2, peers.time_peers, work, there))
        used = {name: run_ranks(2, peers.memory_of_peer, work, name) for name in there}
        reference, rows = times["partial_fc"], []
        for name in names:
            if name not in there:
                rows.append(_row(f"{work}: {name}", "× ours", None, None, "not installed"))
                continue
            took, worst = times[name], max(used[name], key=lambda a: a["peak"] - a["start"])
            held = worst["held"] / MIB
            step = (worst["peak"] - worst["start"]) / MIB - held
            note = (
                f"{took.seconds * 1e3:.0f} ms, {ratio(took.wall, times['floor'].wall):.2f} × floor; "
                f"{held + step:.0f} MiB a rank: weights and state {held:.0f}, step {step:.0f}"
            )
            figures = {"peer": name, "workload": str(work), "seconds": took.seconds, "held_mib": held, "step_mib": step}
            value = ratio(took.wall, reference.wall)
            rows.append(
                _row(
                    f"{work}: {name}",
                    "× ours",
                    value,
                    None,
                    note,
                    **figures,
                    wall=took.wall,
                    cpu=took.cpu,
                    raw=used[name],
                )
            )
        return rows


CASES = ("exact", "sampled", "many", "skipped", "bf16", "memory", "memory_in_backward", "peers", "growth")


def _row(title: str, unit: str, value: float | None, limit: float | None, note: str, **more: Any) -> Row:
    return {"title": title, "unit": unit, "value": value, "limit": limit, "note": note, **more}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("torch", "numpy", "pytorch-metric-learning")
    versions = {name: metadata.version(name) for name in packages if any(metadata.distributions(name=name))}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu,
        "processors": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--quick", action="store_true", help="sizes at which everything runs in a moment and figures say nothing"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the five largest operations of every case that misses its mark"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    bench, about, rows, failed = Bench(asked.quick, asked.profile), machine(), [], False
    for case in asked.cases:
        started, load = time.monotonic(), os.getloadavg()[0]
        print(f"{case} (load {load:.1f}) ...", file=sys.stderr, flush=True)
        try:
            measured = getattr(bench, case)()
        except RuntimeError as error:
            failed = True
            print(error, file=sys.stderr)
            measured = [_row(case, "", None, None, "failed: " + str(error).strip().splitlines()[-1])]
        rows += [{"case": case, "load_before": load, **row} for row in measured]
        for row in measured:
            print(f"  {report.cell(row)}  {row['title']}; {row['note']}", file=sys.stderr, flush=True)
        print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
        results = {"quick": asked.quick, "machine": about, "rows": rows}
        (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = report.table(rows, asked.quick)
    (asked.out / "table.md").write_text(table)
    report.plot(rows, asked.out / "head.png")
    print(table)
    if asked.profile:
        print(report.profiles(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
