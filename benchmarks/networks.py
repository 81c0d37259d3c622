"""A bad network: a run on two and three nodes whose network delays, loses, reorders, slows, is cut, or loses a node.

    python benchmarks/networks.py                  all cases, each once: what has a result is not run again
    python benchmarks/networks.py --list           the cases, and which have a result
    python benchmarks/networks.py --only NAME ...  these, again

Needs root, in a sandbox of its own: nodes are network namespaces with host names and process ids of their own
(networks_run.py; Debian's packages iproute2 and nftables). They and all processes are removed when it ends, however it
does. Loss, delay and reordering are made by a process that all packets pass through (networks_relay.py).

A case trains a small run, one rank a node. Where something happens to the network, it happens in the middle of the
forward of step 9, for which rank 0 stops itself (partial_fc/training/faults.py) and is let go on afterwards. A case is
passed if the run either

    ends well      with every logged figure of every step equal to that of a run on a network that nothing disturbs; or
    ends in error  on every node that is left, in time (`train.timeout` + TELLS), by a message that names the ranks and
                   the nodes that are out of reach; and, when the network is whole again and the same command was given
                   again, goes on from the newest checkpoint and has the figures of the undisturbed run.

Each result is a file in runs/networks. When all cases have one, the table in docs/bad-networks.md is written.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from networks_run import ROOT, Nodes, NoNetwork, Relay, Started, Switch
from PIL import Image

PAGE, BEGIN, END = ROOT / "docs/bad-networks.md", "<!-- written by benchmarks/networks.py -->", "<!-- to here -->"
TELLS = 30  # seconds after the timeout, at most, until every node has said who is missing (docs/bad-networks.md)
LEAVES = 60  # seconds after that, at most, until the launchers of all nodes have ended
STARTS = 240  # seconds, at most, until a run is at its step 9, or goes on, on a machine with other work
STEP, STEPS, KEPT = 9, 18, 4  # the step that something happens in, of how many; a checkpoint every so many


@dataclass(frozen=True)
class Case:
    """One kind of network."""

    name: str
    fault: str
    event: Callable[[Stage], None] | None = None
    names: dict[int, tuple[int, ...]] | None = None
    """Of each node that is left, the nodes (and with one rank each, the ranks) that its error must name; None where the
    run must end well."""
    nodes: int = 2
    launcher: str = "torchrun"
    timeout: float = 30
    heals: float | None = None
    """Seconds until the network is whole again. If that is in time, the run may end well though it has `names`."""
    returns: int | None = None
    """A node that is started again when another has named it: then the run must go on and end well by itself."""
    road: dict[str, float] = field(default_factory=dict)
    rate: str = ""
    retries: int | None = None
    """After how many tries the kernels of the nodes give a connection up (net.ipv4.tcp_retries2); 15 if not given."""
    at_start: bool = False
    """The event is before the run is started."""

    def network(self, name: str) -> Switch | Relay:
        return Relay(**self.road) if self.road else Switch(name)


@dataclass
class Stage:
    """A case that is running, and when the event was."""

    case: Case
    nodes: Nodes
    folder: Path
    started: list[Started]
    clock: float = 0.0

    @property
    def switch(self) -> Switch:
        assert isinstance(self.nodes.network, Switch)
        return self.nodes.network

    def history(self) -> list[dict[str, Any]]:
        """Without what is of the clock."""
        path = self.folder / "history.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key != "data_wait"} for row in rows]


# -------------------------------------------------------------------------------------------------------- what happens


def cut(*ways: tuple[int, int]) -> Callable[[Stage], None]:
    """What the one node sends to the other is dropped, for each way."""
    return lambda stage: stage.switch.cut(*ways)


def between(a: int, b: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b), (b, a)


def vanish(node: int) -> Callable[[Stage], None]:
    """A power cut: the cable is dead first, so that nobody hears the processes end."""

    def happen(stage: Stage) -> None:
        stage.switch.unplug(node)
        stage.started[node].kill()

    return happen


def freeze(node: int) -> Callable[[Stage], None]:
    """The machine hangs: its processes exist, and its cable is dead."""

    def happen(stage: Stage) -> None:
        stage.switch.unplug(node)
        stage.started[node].freeze()

    return happen


EACH_OTHER = {0: (1,), 1: (0,)}
CASES = [
    Case("delay", "every packet takes 100 ± 50 ms", road={"delay": 0.1, "jitter": 0.05}, timeout=60),
    Case("loss", "5 % of all packets are lost", road={"loss": 0.05}, timeout=60),
    Case("reordering", "a quarter of all packets is overtaken", road={"reorder": 0.25}, timeout=60),
    Case("rough", "three nodes; 30 ± 15 ms, 2 % lost, a tenth overtaken", nodes=3, timeout=60,
         road={"delay": 0.03, "jitter": 0.015, "loss": 0.02, "reorder": 0.1}),
    Case("10mbit", "a line of 10 Mbit/s", rate="10mbit", timeout=60),
    Case("cut-20s", "cut for 20 s", cut(*between(0, 1)), heals=20, timeout=60),
    Case("cut", "cut", cut(*between(0, 1)), EACH_OTHER),
    Case("cut-from-first", "what the first node sends is lost", cut((0, 1)), EACH_OTHER),
    Case("cut-to-first", "what the second node sends is lost", cut((1, 0)), EACH_OTHER),
    Case("cut-one-off", "three nodes; the third is cut off", cut(*between(0, 2), *between(1, 2)),
         {0: (2,), 1: (2,), 2: (0,)}, nodes=3),
    Case("cut-first-off", "three nodes; the first is cut off", cut(*between(0, 1), *between(0, 2)),
         {0: (1, 2), 1: (0,), 2: (0,)}, nodes=3),
    Case("cut-pair", "three nodes; cut between the second and the third", cut(*between(1, 2)),
         {0: (1, 2), 1: (1, 2), 2: (1, 2)}, nodes=3),
    Case("cut-pair-one-way", "three nodes; what the second sends to the third is lost", cut((1, 2)),
         {0: (1, 2), 1: (1, 2), 2: (1, 2)}, nodes=3),
    Case("vanish-second", "the second node loses its power", vanish(1), {0: (1,)}),
    Case("vanish-first", "the first node loses its power", vanish(0), {1: (0,)}),
    Case("freeze-second", "the second node hangs", freeze(1), {0: (1,)}),
    Case("freeze-first", "the first node hangs", freeze(0), {1: (0,)}),
    Case("accelerate-cut", "cut", cut(*between(0, 1)), EACH_OTHER, launcher="accelerate"),
    Case("accelerate-vanish-first", "the first node loses its power", vanish(0), {1: (0,)}, launcher="accelerate"),
    Case("elastic-cut", "cut for 60 s, twice the timeout", cut(*between(0, 1)), EACH_OTHER, launcher="elastic", heals=60),
    Case("elastic-vanish", "the second node loses its power, and is started again", vanish(1), {0: (1,)}, returns=1,
         launcher="elastic"),
    Case("elastic-vanish-first", "the first node, which has the rendezvous, loses its power; `tcp_retries2` is 8",
         vanish(0), {1: (0,)}, launcher="elastic", retries=8),
    Case("cut-at-start", "cut when the run is started, for 60 s", cut(*between(0, 1)), heals=60, at_start=True),
    Case("cut-10min", "cut for 10 minutes, with the timeout as it is", cut(*between(0, 1)), EACH_OTHER, heals=600, timeout=600),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- one case


class Networks:
    """The cases, in `out`: the data, the runs, a result file for each case. name: of the nodes, NAME-0, NAME-1, ..."""

    def __init__(self, out: Path, name: str) -> None:
        self.out = out
        self.name = name
        self.config = out / "run.yaml"

    def prepare(self) -> None:
        """Write the images and the settings of the run, once."""
        if self.config.exists():
            return
        random = np.random.default_rng(0)
        for identity in range(12):
            (self.out / f"images/id{identity}").mkdir(parents=True, exist_ok=True)
            color = random.integers(0, 255, (1, 1, 3))
            for k in range(8):
                pixels = np.clip(color + random.integers(-60, 60, (20, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(self.out / f"images/id{identity}/{k}.png")
        settings: dict[str, Any] = {
            "data": {"folder": str(self.out / "images"), "image_size": 32, "workers": 0},
            "backbone": {"embedding_size": 32},
            "head": {"margin": {"class_path": "ArcFace", "init_args": {"scale": 16.0}}, "sample_rate": 0.5},
            "schedule": {"warmup_epochs": 0},
            "train": {"epochs": 3, "batch_size": 16, "cpu": True, "checkpoint_steps": KEPT},
            "output": {"log_every": 1},
        }
        self.config.write_text(yaml.safe_dump(settings))
        file = ROOT / "configs/accelerate/two_nodes.yaml"
        (self.out / "accelerate.yaml").write_text(file.read_text().replace("num_processes: 16", "num_processes: 2"))

    def result(self, case: Case) -> dict[str, Any] | None:
        path = self.out / f"{case.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def undisturbed(self, nodes: int) -> list[dict[str, Any]]:
        """The history of the run on a network that nothing disturbs."""
        path = self.out / f"undisturbed-{nodes}.json"
        if not path.exists():
            case = Case(path.stem, "none", nodes=nodes)
            with Nodes(self.name, nodes, Switch(self.name)) as made:
                stage = self._stage(case, made)
                try:
                    self._start(stage, timeout=STARTS)
                    codes = self._wait(stage, lambda: False, 2 * STARTS)
                    if codes != [0] * nodes:
                        raise SystemExit(f"the undisturbed run failed: {codes}\n{stage.started[0].tail()}")
                finally:
                    for each in stage.started:
                        each.kill()
            path.write_text(json.dumps(stage.history()))
        history: list[dict[str, Any]] = json.loads(path.read_text())
        assert [row["step"] for row in history] == [*range(1, STEPS + 1)]
        return history

    def run(self, case: Case) -> dict[str, Any]:
        """Run a case; write and return its result."""
        expected = self.undisturbed(case.nodes)
        began = time.monotonic()
        with Nodes(self.name, case.nodes, case.network(self.name)) as nodes:
            nodes.retries = case.retries
            stage = self._stage(case, nodes)
            try:
                found = self._judge(stage, expected)
            finally:
                for each in stage.started:
                    each.kill()
        found.update(name=case.name, seconds=time.monotonic() - began, network=nodes.said)
        (self.out / f"{case.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        return found

    def _stage(self, case: Case, nodes: Nodes) -> Stage:
        folder = self.out / "run"
        for old in (folder, self.out / "stopped"):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        return Stage(case, nodes, folder, [])

    def _start(self, stage: Stage, *of: int, faults: str = "", timeout: float | None = None) -> None:
        """Start the run on all nodes, or on these. timeout: in place of the case's."""
        case, log = stage.case, self.out / "logs"
        log.mkdir(exist_ok=True)
        for node in of or range(case.nodes):
            settings = f"{self.config} --output.folder {stage.folder} --train.timeout {timeout or case.timeout} --start_or_resume"
            file = f" {self.out / 'accelerate.yaml'}" if case.launcher == "accelerate" else ""
            script = {"torchrun": "torchrun", "elastic": "torchrun_elastic", "accelerate": "accelerate_nodes"}
            started = Started.on(
                stage.nodes,
                node,
                f"launch/{script[case.launcher]}.sh{file} {settings}",
                log / f"{case.name}-{node}.log",
                NPROC="1",
                NNODES=str(case.nodes),
                NODE_RANK=str(node),
                MACHINE_RANK=str(node),
                MASTER_ADDR=stage.nodes.addresses[0],
                RDZV_ENDPOINT=f"{stage.nodes.addresses[0]}:29400",
                PARTIAL_FC_FAULTS=faults,
            )
            if of:
                stage.started[node].kill()
                stage.started[node] = started
            else:
                stage.started.append(started)

    def _wait(self, stage: Stage, until: Callable[[], bool], seconds: float) -> list[int | None]:
        """Wait until all nodes that live have ended, or `until`; return their exit codes."""
        deadline = time.monotonic() + seconds
        while not until() and any(each.code is None and not each.frozen for each in stage.started):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return [each.code for each in stage.started]

    def _judge(self, stage: Stage, expected: list[dict[str, Any]]) -> dict[str, Any]:
        case, stopped = stage.case, self.out / "stopped"
        if case.rate:
            stage.switch.slow(case.rate)
        faults = f"stop:forward@step={STEP},rank=0,once={stopped}" if case.event and not case.at_start else ""
        if case.at_start and case.event:
            case.event(stage)
        stage.clock = time.monotonic()
        self._start(stage, faults=faults)
        if faults:
            self._wait(stage, stopped.exists, STARTS)
            if not stopped.exists():
                return {"problems": [f"step {STEP} was not reached: {stage.started[0].tail()}"]}
            time.sleep(0.5)  # until the others wait in their collective
            assert case.event is not None
            case.event(stage)
            stage.clock = time.monotonic()
            stage.started[0].go_on()
        if case.names is None or case.returns is not None:
            found = self._ends_well(stage)
        else:
            found = self._ends_in_error(stage)
        if not found["problems"] and stage.history() != expected:
            mine = stage.history()
            step = next((a["step"] for a, b in zip(mine, expected, strict=False) if a != b), len(mine) + 1)
            found["problems"].append(f"the figures are not those of the undisturbed run from step {step} on")
        return found

    def _ends_well(self, stage: Stage) -> dict[str, Any]:
        """The run survives, or its launcher starts it again."""
        case, problems = stage.case, []
        if case.heals is not None:
            self._wait(stage, lambda: time.monotonic() > stage.clock + case.heals, case.heals + 1)
            stage.switch.mend()
        if case.returns is not None:
            others = [node for node in range(case.nodes) if node != case.returns]
            self._wait(stage, lambda: all(said(stage, node) for node in others), case.timeout + TELLS)
            stage.switch.mend()
            self._start(stage, case.returns)
        codes = self._wait(stage, lambda: False, 2 * STARTS)
        if codes != [0] * case.nodes:
            problems.append(f"ended with {codes}: " + "; ".join(each.tail() for each in stage.started))
        words = {node: said(stage, node) for node in case.names or {}}
        problems += [each for node in words for each in wrong_in(stage, node, words[node])]
        words = {node: found for node, found in words.items() if found}
        ended = max((each.ended or 0.0) for each in stage.started) - stage.clock
        return {"problems": problems, "said": words, "ended": ended, "well": True, "again": again(stage)}

    def _ends_in_error(self, stage: Stage) -> dict[str, Any]:
        """Every node that is left names those that are out of reach; then the run is started again."""
        case = stage.case
        assert case.names is not None
        left = [stage.started[node] for node in case.names]
        restarts = case.launcher == "elastic"  # and has to meet again, or to find that it cannot
        limit = STARTS * 2 if restarts else case.timeout + TELLS + LEAVES

        def ended() -> bool:
            return all(each.ended is not None for each in left)

        if case.heals is not None:
            self._wait(stage, lambda: ended() or time.monotonic() > stage.clock + case.heals, case.heals + 1)
            stage.switch.mend()
        self._wait(stage, ended, limit)
        words = {node: found for node in case.names if (found := said(stage, node))}
        if case.heals is not None and all(each.code == 0 for each in left):
            # whole again in time, or the launchers have started the ranks again
            last = max(each.ended or 0.0 for each in left) - stage.clock
            problems = [each for node in words for each in wrong_in(stage, node, words[node])]
            return {"problems": problems, "said": words, "ended": last, "well": True, "again": again(stage)}
        problems = [each for node in case.names for each in wrong_in(stage, node, words.get(node, {}))]
        leaves = {node: stage.started[node].ended for node in case.names}
        problems += [f"node {node} did not end within {limit:.0f} s" for node, at in leaves.items() if at is None]
        after = {node: None if at is None else at - stage.clock for node, at in leaves.items()}
        for each in stage.started:
            each.kill()
        stage.switch.mend()
        stage.started = []
        step = max((row["step"] for row in stage.history()), default=0)
        self._start(stage, timeout=STARTS)
        codes = self._wait(stage, lambda: False, 2 * STARTS)
        if codes != [0] * case.nodes:
            problems.append(f"started again, it ended with {codes}: {stage.started[0].tail()}")
        return {"problems": problems, "said": words, "ended": after, "well": False, "step": step, "again": again(stage)}


# --------------------------------------------------------------------------------------------------- what was said


def said(stage: Stage, node: int) -> dict[str, Any]:
    """The error of a node's rank, and after how many seconds; {} before it has one."""
    for kind in ("RankMissing: ", "partial-fc: error", "Error: "):
        for clock, text in stage.started[node].lines:
            if kind in text and "ChildFailedError" not in text:
                return {"after": clock - stage.clock, "text": text[text.index(kind) :].removeprefix("RankMissing: ")}
    return {}


def wrong_in(stage: Stage, node: int, words: dict[str, Any]) -> list[str]:
    """What is wrong with what a node said."""
    assert stage.case.names is not None
    if not words:
        return [f"node {node} has said nothing: {stage.started[node].tail()}"]
    found = []
    latest = stage.case.timeout + TELLS
    if words["after"] > latest:
        found.append(f"node {node} has said it after {words['after']:.0f} s, not within {latest:.0f} s")
    for missing in stage.case.names[node]:
        for text in (
            rf"\branks?\b[^;.(]*\b{missing}\b",
            stage.nodes.names[missing],
            re.escape(stage.nodes.addresses[missing]),
        ):
            if not re.search(text, words["text"]):
                found.append(f"node {node} does not say {text!r}: {words['text']}")
    return found


def again(stage: Stage) -> int | None:
    """From which step the run has gone on, as it says; None if it has not."""
    texts = [text for each in stage.started for _, text in each.lines]
    found = [re.search(r"resuming after epoch \d+, step (\d+)", text) for text in texts]
    return next((int(each[1]) for each in reversed(found) if each), None)


# ------------------------------------------------------------------------------------------------------- the table


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row a case that has a result."""
    lines = ["| case | network | launcher, timeout | what every node said | went on |", "|---|---|---|---|---|"]
    for case in CASES:
        found = results.get(case.name)
        if found is None:
            continue
        cells = [f"`{case.name}`", case.fault, f"{case.launcher}, {case.timeout:g} s", _told(case, found), _went(found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(case: Case, found: dict[str, Any]) -> str:
    if found["problems"]:
        return "PROBLEM: " + "; ".join(found["problems"]).replace("\n", " ").replace("|", "/")[:400]
    counts = found["network"]
    of = (
        f" ({counts['packets']:,} packets, {counts['lost']:,} lost, {counts['overtaken']:,} overtaken)"
        if counts
        else ""
    )
    parts = []
    for node, words in found["said"].items():
        text = words["text"].partition(" Usual causes")[0].partition(" The process group can")[0].replace("|", "/")
        ended = found["ended"]
        leaves = f", its launcher ended after {ended[node]:.0f} s" if isinstance(ended, dict) else ""
        parts.append(f"node {node} after {words['after']:.0f} s: “{text}”{leaves}")
    gone = [str(node) for node in range(case.nodes) if found["said"] and str(node) not in found["said"]]
    parts += [f"node {node} is gone" for node in gone]
    return "<br>".join(parts) if parts else f"no error{of}"


def _went(found: dict[str, Any]) -> str:
    if found["problems"]:
        return ""
    if found["well"] and found["again"] is None:
        return "never stopped; all figures equal"
    how = "by itself" if found["well"] else "started again"
    return f"{how}, from step {found['again'] or 0}; all figures equal"


def write_page(text: str) -> None:
    """Put the table in its place in the page."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train over a bad network; compare with a run that nothing disturbs.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[case.name for case in CASES], help="these, again")
    parser.add_argument("--list", action="store_true", help="the cases, and which have a result")
    parser.add_argument(
        "--minutes", type=float, default=120, help="begin no case after so many; the same command goes on"
    )
    parser.add_argument("--out", default="runs/networks", help="folder of the results")
    parser.add_argument("--name", default="pfcnet", help="of the nodes; two of these commands at once need two")
    asked = parser.parse_args()
    networks, began = Networks(Path(asked.out).absolute(), asked.name), time.monotonic()
    if not asked.list:
        networks.out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        networks.prepare()
        for case in CASES:
            if (case.name not in asked.only) if asked.only else networks.result(case) is not None:
                continue
            if time.monotonic() - began > 60 * asked.minutes:
                break
            print(f"{case.name}: {case.fault}", file=sys.stderr, flush=True)
            try:
                found = networks.run(case)
            except NoNetwork as error:
                print(f"networks.py: {error}", file=sys.stderr)
                return 2
            for problem in found["problems"] or [f"passed in {found['seconds']:.0f} s"]:
                print(f"    {problem}", file=sys.stderr, flush=True)
    results = {case.name: found for case in CASES if (found := networks.result(case)) is not None}
    if asked.list:
        for case in CASES:
            state = "-" if case.name not in results else "PROBLEM" if results[case.name]["problems"] else "passed"
            print(f"{case.name:<24} {state:<8} {case.fault}")
        return 0
    print(table(results))
    if len(results) == len(CASES):
        write_page(table(results))
    bad = [name for name, found in results.items() if found["problems"]]
    print(f"{len(results)} of {len(CASES)} cases have a result, {len(results) - len(bad)} passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
