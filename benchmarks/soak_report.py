"""What the soak (soak.py) found: faults by kind as a table, the final metrics beside the undisturbed run's, JSON, a
picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_memory import Memory
from soak_run import Watch

COLOURS = {"killed": "#c0392b", "slow": "#7f8c8d", "hung": "#8e44ad", "asked": "#1f6f8b", "full": "#d68910"}


@dataclass
class Fault:
    """One that was injected. Times in seconds; steps of the run."""

    kind: str
    round: int
    rank: int
    once: str = ""
    when: float = 0.0
    """Since the soak began."""
    clock: float = 0.0
    at: int = 0
    """The newest logged step then."""
    step: int = 0
    """The step beyond which the run must come for the fault to be survived."""
    restarts: int = 0
    lost: int = 0
    """Steps computed again because of it."""
    lost_before: int = 0
    saved: bool = False
    """Whether the run said that it was asked to stop and has saved."""
    seconds: float | None = None
    """Until the next new step (or the end of the run): then it is survived."""

    def __str__(self) -> str:
        return f"{self.kind} (rank {self.rank}, step {self.at}, round {self.round})"


@dataclass
class Round:
    """A disturbed run: of every row of its history that was seen, also of steps that were computed again, the seconds
    since the soak began, the step and the loss."""

    name: str
    seen: list[tuple[float, int, float]]

    @classmethod
    def of(cls, watch: Watch, began: float) -> Round:
        return cls(watch.folder.name, [(when - began, step, loss) for when, step, loss in watch.seen])


@dataclass
class Results:
    """Of all rounds."""

    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    evaluations: list[list[dict[str, Any]]] = field(default_factory=list)
    spoilt: tuple[int, int] = (0, 0)
    restarts: int = 0
    lost: int = 0
    minutes: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Results:
        faults, rounds = [Fault(**each) for each in found["faults"]], [Round(**each) for each in found["rounds"]]
        return cls(**{**found, "faults": faults, "rounds": rounds, "spoilt": tuple(found["spoilt"])})


def table(faults: list[Fault]) -> str:
    """A row a kind, and their sum."""
    heads = (
        "fault",
        "injected",
        "survived",
        "restarts",
        "steps lost, most of one",
        "seconds to the next new step: median, most",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in [*sorted({fault.kind for fault in faults}), "all"]:
        these = [fault for fault in faults if kind in (fault.kind, "all")]
        seconds = sorted(fault.seconds for fault in these if fault.seconds is not None)
        times = f"{seconds[len(seconds) // 2]:.0f}, {seconds[-1]:.0f}" if seconds else "–"
        lost = f"{sum(fault.lost for fault in these)}, {max((fault.lost for fault in these), default=0)}"
        lines.append(
            f"| {kind} | {len(these)} | {len(seconds)} | {sum(fault.restarts for fault in these)} | {lost} | {times} |"
        )
    return "\n".join(lines) + "\n"


def metrics(results: Results, undisturbed: list[dict[str, Any]]) -> str:
    """TAR at FAR 1e-3 of each set of identities, undisturbed and in each round."""
    lines = [
        "| TAR @ FAR 1e-3 | undisturbed | "
        + " | ".join(f"round {i + 1}" for i in range(len(results.evaluations)))
        + " |"
    ]
    lines.append("|---" * (2 + len(results.evaluations)) + "|")
    for i, each in enumerate(undisturbed):
        figures = [each["tar"]["1e-3"], *(evaluation[i]["tar"]["1e-3"] for evaluation in results.evaluations)]
        lines.append(f"| {each['name']} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
    return "\n".join(lines) + "\n"


def write_report(results: Results, reference: Watch, memory: Memory, out: Path) -> str:
    """report.md, report.json and report.png in `out`; the text of the first."""
    undisturbed = json.loads((reference.folder / "metrics.json").read_text())["evaluations"]
    trained = len(results.evaluations) * reference.step
    verdict = "\n".join(f"PROBLEM: {problem}" for problem in results.problems) or (
        f"Every logged figure of every step, and the final metrics, of {len(results.evaluations)} disturbed runs equal those of the "
        "undisturbed one."
    )
    whole, part = results.spoilt
    text = f"""# Soak of {results.minutes:.1f} minutes

{verdict}

{len(results.rounds)} rounds of a run of {reference.step} steps, {len(results.evaluations)} of them complete: {trained:,} steps, and
{results.lost:,} that were computed again after {results.restarts} restarts. In each run {whole} batches were left out because a rank could
read none of its images, and {part} were trained on without three of them.

{table(results.faults)}
{metrics(results, undisturbed)}
{memory.table()}"""
    (out / "report.md").write_text(text)
    found = {
        **{name: getattr(results, name) for name in ("minutes", "problems", "restarts", "lost", "spoilt")},
        "rounds": len(results.rounds),
        "memory": memory.figures(),
        "steps": reference.step,
        "faults": [asdict(fault) for fault in results.faults],
        "undisturbed": undisturbed,
        "evaluations": results.evaluations,
    }
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(results, reference, memory, out / "report.png")
    return text


def plot(results: Results, reference: Watch, memory: Memory, path: Path) -> None:
    """Above, how far the rounds came by the time, with the faults; then the loss of every step that was computed,
    however often; below, the memory of the ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 12), layout="constrained")
    above, below, lowest = figure.subplots(3, 1)
    for each in results.rounds:
        above.plot(
            [when / 60 for when, _, _ in each.seen],
            [step for _, step, _ in each.seen],
            color="#9aa5b1",
            linewidth=1,
        )
    for name, colour in COLOURS.items():
        these = [fault for fault in results.faults if fault.kind.startswith(name)]
        label = f"{name}: {len(these)}"
        above.scatter(
            [fault.when / 60 for fault in these],
            [fault.at for fault in these],
            color=colour,
            s=22,
            label=label,
            zorder=3,
        )
    above.set(xlabel="minutes since the soak began", ylabel="step", title="Steps of the disturbed runs, and the faults")
    above.legend(loc="lower right", fontsize=8)
    seen = [(step, loss) for each in results.rounds for _, step, loss in each.seen]
    label = "disturbed runs, steps computed again included"
    below.scatter([step for step, _ in seen], [loss for _, loss in seen], color="#c0392b", s=9, label=label)
    rows = reference.rows()
    below.plot(
        [row["step"] for row in rows],
        [row["loss"] for row in rows],
        color="#1f6f8b",
        linewidth=0.8,
        label="undisturbed run",
    )
    below.set(xlabel="step", ylabel="loss", title="Loss")
    below.legend(fontsize=8)
    memory.plot(lowest)
    figure.savefig(path, dpi=110)
