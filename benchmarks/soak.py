"""A soak: train the embedded characters under a fault injector, and compare every step with a run that nothing
disturbed.

    python benchmarks/soak.py --minutes 60 --seed 0      about an hour on two cores; the report is in runs/soak
    python benchmarks/soak.py --minutes 60 --rows files --out runs/soak-files      the same with rows in files
    python benchmarks/soak.py --minutes 2                at a size that says nothing of the metric; also a slow test

The same command goes on with a soak that was stopped: after each round its state is in its folder, and a round that was
not over is begun again. After `--part` minutes (120) it begins no other round and ends with 75.

Two ranks on the CPU. First the run is left alone (the reference). Then it is trained again in rounds, until the time is
up, while

    killed        a rank gets SIGKILL: at a random time, while it starts, or in a named phase
                  (partial_fc/training/faults.py)
    slow          a rank is stopped for seconds, then goes on
    hung          a rank is stopped for good: the other ends at the process group's timeout, the launcher kills it
    asked         SIGTERM to the launcher, SIGTERM or SIGUSR1 to a rank: the run saves and leaves
    full disk     the run's own small file system is filled up, and room made when the run has ended of it; where none
                  can be mounted, a
                  write is made to fail as it would

and is started again, by `launch/torchrun.sh` (by hand) and `launch/torchrun_elastic.sh` (which restarts by itself) in
turn, with and without asynchronous checkpoints and loading processes. Batches whose images cannot be read are the same
in all runs, so that *every* logged figure of *every* step must be equal, and the final metrics. With `--rows files` half
of the classes are drawn in each step, the others make their steps later (`skipped_rows="dense"`), in all runs; the runs
that are disturbed have class rows in files on the small file system, which the run on its own has in memory, and all
checkpoints are asynchronous.

The resident memory of both ranks is looked at all the time (soak_memory.py): it must not grow, neither in the life of a
process nor over the soak.

Exit code 1, and why in the report, if a run ends or restarts without a fault, takes longer than it may, leaves a
process behind, grows, or differs from the reference in any figure.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from soak_memory import Memory
from soak_report import Fault, Results, Round, write_report
from soak_run import Disk, Launch, Watch, free_port, send

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")
IN_PHASE = [f"killed in {phase}" for phase in PHASES]
ASKED = {
    "asked, launcher SIGTERM": signal.SIGTERM,
    "asked, rank SIGTERM": signal.SIGTERM,
    "asked, rank SIGUSR1": signal.SIGUSR1,
}
STOPS = {"killed": signal.SIGKILL, "killed at start": signal.SIGKILL, "slow": signal.SIGSTOP, "hung": signal.SIGSTOP}
PATIENCE, STARTS = 30, 120  # seconds: of torchrun, between SIGTERM and SIGKILL; to start, on a machine with other work
CHECKPOINT_STEPS = 10


class Soak:
    """Rounds of one run. `open` is the fault that has happened and is not yet survived, `armed` one that the ranks were
    started with."""

    def __init__(self, asked: argparse.Namespace, out: Path, disk: Disk) -> None:
        self.minutes, self.seed, self.out, self.disk = asked.minutes, asked.seed, out, disk
        self.in_files, self.part, self.timeout = asked.rows == "files", asked.part, asked.timeout
        self.may_take = asked.timeout + PATIENCE + STARTS  # seconds from a fault to the next new step
        self.quick, self.random = asked.minutes < 10, random.Random(asked.seed)
        self.epochs = asked.epochs or (8 if self.quick else max(12, int(asked.minutes)))
        self.began = self.part_began = time.monotonic()
        self.results = Results()
        self.memory = Memory()
        self.open: Fault | None = None
        self.armed: Fault | None = None
        self.starts, self._told = 0, 0.0
        self._decks: dict[str, list[str]] = {"sent": [], "in phase": []}
        asked_ways = [self.random.choice(list(ASKED))] if self.quick else list(ASKED)
        self.sent_kinds = ["killed", "slow", "hung", "full disk", *asked_ways] + (
            [] if self.quick else ["killed at start"]
        )
        self.wanted = {*self.sent_kinds, *([] if self.quick else IN_PHASE)}  # what is to happen at least once
        self.armed_kinds = list(IN_PHASE)
        if not disk.real:
            self.sent_kinds.remove("full disk")
            self.armed_kinds.append("full disk")
        self.spoilt = self._spoilt()
        self._asked = {name: value for name, value in vars(asked).items() if name not in ("out", "part")}
        self._state = out / "state.json"
        if self._state.exists():
            self._go_on()

    # -------------------------------------------------------------------------------------------------- in parts

    def _go_on(self) -> None:
        """With what is in the folder, as if no time had passed since."""
        state = json.loads(self._state.read_text())
        if state["asked"] != self._asked:
            sys.exit(
                f"{self.out} holds a soak of other settings, {state['asked']}: go on with these, or give another --out"
            )
        self.began -= state["seconds"]
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))
        self.starts, self._decks = state["starts"], state["decks"]
        self.results = Results.from_json(state["results"])
        self.memory = Memory(state["memory"])

    def save(self) -> None:
        """After a round, or the undisturbed run."""
        state = {
            "asked": self._asked,
            "seconds": time.monotonic() - self.began,
            "random": self.random.getstate(),
            "starts": self.starts,
            "decks": self._decks,
            "results": self.results.as_json(),
            "memory": self.memory.samples,
        }
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._state)

    # ------------------------------------------------------------------------------------------------ what is run

    def _spoilt(self) -> str:
        """Batches of which a rank can read no image (left out by all) or all but three: about one in thirty, alike in
        all runs."""
        chosen = random.Random(self.seed + 1)
        batches = self.epochs * (9 if self.quick else 39)
        numbers = sorted(chosen.sample(range(batches), max(2, batches // 30)))
        whole = {n: i % 2 == 0 for i, n in enumerate(numbers)}
        self.results.spoilt = (sum(whole.values()), len(numbers) - sum(whole.values()))
        return ";".join(
            f"unreadable:data@batch={n},rank={chosen.randrange(2)}" + ("" if whole[n] else ",images=3") for n in numbers
        )

    def _launch(self, script: str, folder: Path, log: Path, *more: str, faults: str = "") -> Launch:
        small = ["--data.identities", "60", "--train.batch_size", "64"] if self.quick else []
        settings = [
            "configs/quickstart.yaml", "--output.folder", str(folder), "--train.epochs", str(self.epochs), "--output.log_every", "1",
            "--train.checkpoint_steps", str(CHECKPOINT_STEPS), "--train.timeout", str(self.timeout), *small, *more,
        ]  # fmt: skip
        if self.in_files:
            settings += ["--head.sample_rate", "0.5", "--head_skipped_rows", "dense"]
        environment = {
            "NPROC": "2",
            "MASTER_PORT": str(free_port()),
            "MAX_RESTARTS": "3",
            "PARTIAL_FC_FAULTS": f"{self.spoilt};{faults}",
        }
        return Launch(script, settings, environment, log)

    def reference(self) -> Watch:
        """The run that nothing disturbs, which an earlier part may have made."""
        folder, log = self.out / "undisturbed", self.out / "undisturbed.log"
        watch = Watch(folder)
        if self._state.exists():
            watch.look()
            return watch
        shutil.rmtree(folder, ignore_errors=True)
        launch = self._launch("launch/torchrun.sh", folder, log)
        try:
            while launch.code() is None:
                watch.look()
                self.memory.look(launch.ranks(), watch, time.monotonic() - self.began, "undisturbed")
                self.tell(f"undisturbed run, step {watch.step}")
                time.sleep(0.2)
        finally:
            launch.kill()
        watch.look()
        if launch.code() != 0:
            sys.exit(f"the undisturbed run failed, see {log}:\n{launch.tail()}")
        self.memory.drop("undisturbed", watch, self.began)
        self.save()
        return watch

    def soak(self, reference: Watch) -> bool:
        """Rounds until the time is up; whether it is."""
        while not self.results.problems and not self.over():
            if time.monotonic() - self.part_began > 60 * self.part:
                return False
            rounds = len(self.results.rounds) + 1
            watch = Watch(self.disk.folder / f"round-{rounds}")
            while not self.run_once(watch, rounds, reference.step) and not self.results.problems:
                pass
            self.disk.room()
            if not self.results.problems:
                self.compare(watch, reference)
            self.results.rounds.append(Round.of(watch, self.began))
            kept = self.out / watch.folder.name
            kept.mkdir(exist_ok=True)
            for name in ("history.jsonl", "metrics.json", "unreadable.txt"):
                if (watch.folder / name).exists():
                    shutil.copy(watch.folder / name, kept / name)
            shutil.rmtree(watch.folder, ignore_errors=True)
            if not self.results.problems:
                self.save()
        self.results.problems += self.memory.problems()
        return True

    def over(self) -> bool:
        """Whether there are to be no more faults: the time is up, and all that can happen has happened."""
        happened = {fault.kind for fault in self.results.faults}
        return (
            time.monotonic() - self.began > 60 * self.minutes
            and happened >= self.wanted
            and bool(happened & set(IN_PHASE))
        )

    def compare(self, watch: Watch, reference: Watch) -> None:
        mine, theirs = watch.rows(), reference.rows()
        if mine != theirs:
            where = next(
                (a["step"] for a, b in zip(mine, theirs, strict=False) if a != b), min(len(mine), len(theirs)) + 1
            )
            self.problem(f"{watch.folder.name} differs from the undisturbed run from step {where} on")
        figures = [json.loads((each.folder / "metrics.json").read_text()) for each in (watch, reference)]
        if figures[0]["evaluations"] != figures[1]["evaluations"]:
            self.problem(f"{watch.folder.name}: final metrics differ from those of the undisturbed run")
        left_out = [each["training"]["left_out_batches"] for each in figures]
        if left_out != [self.results.spoilt[0]] * 2:
            self.problem(f"{watch.folder.name}: {left_out} batches were left out, {self.results.spoilt[0]} were spoilt")
        self.results.evaluations.append(figures[0]["evaluations"])

    # ------------------------------------------------------------------------------------------------ one start

    def run_once(self, watch: Watch, rounds: int, last: int) -> bool:
        """One start of a launcher until it ends; whether the run is complete."""
        self.starts += 1
        script = ("launch/torchrun.sh", "launch/torchrun_elastic.sh")[self.starts % 2]
        variety = [
            "--data.workers",
            self.random.choice("01"),
            "--train.asynchronous_checkpoints",
            "true" if self.in_files else self.random.choice(["true", "false"]),
        ]
        if self.in_files:
            variety += ["--head.storage", "FileRows", "--head.storage.folder", str(self.disk.folder / "rows")]
        faults = self.arm(rounds, watch.step, last)
        launch = self._launch(
            script, watch.folder, self.out / f"round-{rounds}.log", "--start_or_resume", *variety, faults=faults
        )
        restarts, lost, since, due = 0, 0, time.monotonic(), None
        if self.armed is None and self.open is None and not self.over() and self.next_of("sent") == "killed at start":
            due = since + self.random.uniform(1, 8)
        try:
            while True:
                code = launch.code()
                watch.look()
                self.memory.look(launch.ranks(), watch, time.monotonic() - self.began, f"round {rounds}", last)
                if self.armed is not None and Path(self.armed.once).exists():
                    self.happen(self.armed, watch)
                    self.armed = None
                if launch.lost > lost:
                    self.results.lost, lost = self.results.lost + launch.lost - lost, launch.lost
                    if self.open is not None:
                        self.open.lost = self.results.lost - self.open.lost_before
                if launch.restarts > restarts:
                    restarts, since = restarts + 1, time.monotonic()
                    self.restarted("the launcher started the ranks again", watch, launch)
                if launch.full:
                    self.disk.room()
                if code is not None:
                    return self.ended(code, launch, watch)
                self.judge(watch, launch, since)
                if self.results.problems:
                    return False
                quiet = self.open is None and self.armed is None and not self.over()
                if quiet and due is None and watch.moved > since:
                    due = time.monotonic() + self.random.uniform(0, 2 if self.quick else 15)
                if quiet and due is not None and time.monotonic() >= due:
                    due = None
                    self.send(launch, watch, rounds)
                self.tell(f"round {rounds}, step {watch.step} of {last}")
                time.sleep(0.1)
        finally:
            launch.kill()

    def judge(self, watch: Watch, launch: Launch, since: float) -> None:
        """Whether the open fault is survived, or something takes too long."""
        now, fault = time.monotonic(), self.open
        if fault is not None:
            if watch.step > fault.step and (fault.restarts or fault.kind == "slow"):
                self.survived()
            elif now - fault.clock > self.may_take:
                self.problem(f"{fault}: no new step after {self.may_take} s", launch)
        elif now - max(since, watch.moved) > self.may_take:
            self.problem(f"nothing moved for {self.may_take} s at step {watch.step}, without a fault", launch)

    def ended(self, code: int, launch: Launch, watch: Watch) -> bool:
        """The launcher has; whether the run is complete."""
        deadline = time.monotonic() + 20
        while left := launch.left():
            if time.monotonic() > deadline:
                self.problem(f"{len(left)} processes outlive the launcher: {left}", launch)
                return False
            time.sleep(0.2)
        if code == 0:
            if self.armed is not None:
                self.problem(f"{self.armed} was to happen and has not", launch)
            if self.open is not None:
                self.survived()
            return True
        if self.open is not None and self.open.kind == "full disk" and not launch.full:
            self.problem(f"{self.open}: ended with code {code}, and not for want of room", launch)
        self.restarted(f"the launcher ended with code {code}", watch, launch)
        return False

    def restarted(self, what: str, watch: Watch, launch: Launch) -> None:
        self.results.restarts += 1
        if self.open is None or self.open.kind == "slow":
            self.problem(
                f"{what} at step {watch.step}, without a fault that explains it (open: {self.open or 'none'})", launch
            )
            return
        self.open.restarts += 1
        self.open.saved |= launch.asked
        self.open.step = max(self.open.step, watch.step)

    def survived(self) -> None:
        assert self.open is not None
        self.open.seconds = time.monotonic() - self.open.clock
        self.open = None

    # ------------------------------------------------------------------------------------------------ faults

    def next_of(self, deck: str) -> str:
        """The next kind: each as often as the others, in random order."""
        if not self._decks[deck]:
            kinds = self.sent_kinds if deck == "sent" else self.armed_kinds
            self._decks[deck] = self.random.sample(kinds, len(kinds))
            self._decks[deck].sort(key="full disk".__eq__)  # the rarest is next, which keeps short soaks short
        return self._decks[deck][-1]

    def arm(self, rounds: int, step: int, last: int) -> str:
        """Now and then, a fault that the ranks are started with, for a phase and a step to come."""
        self.armed = None
        if self.open is not None or self.over() or self.random.random() < 0.5:
            return ""
        kind = self.next_of("in phase")
        action, phase = ("full", "checkpoint") if kind == "full disk" else ("kill", kind.removeprefix("killed in "))
        target = step + self.random.randint(2, 12)
        if phase == "checkpoint":
            target = (target // CHECKPOINT_STEPS + 1) * CHECKPOINT_STEPS
        if phase == "evaluation":
            target = last
            if step < last * 0.8:
                self._decks["in phase"].insert(0, self._decks["in phase"].pop())  # its time will come
                return ""
        elif target >= last:
            return ""
        self._decks["in phase"].pop()
        self.armed = Fault(kind, rounds, self.random.randrange(2), once=str(self.out / f"happened-{self.starts}"))
        Path(self.armed.once).unlink(missing_ok=True)  # of a round that is begun again
        return f"{action}:{phase}@step={target},rank={self.armed.rank},once={self.armed.once}"

    def send(self, launch: Launch, watch: Watch, rounds: int) -> None:
        """Do the next thing to a run under way."""
        ranks = launch.ranks()
        fault = Fault(self.next_of("sent"), rounds, self.random.randrange(2))
        if fault.rank not in ranks or launch.code() is not None:
            return
        if fault.kind == "full disk":
            self.disk.fill()
        elif fault.kind == "asked, launcher SIGTERM":
            launch.process.terminate()
        elif not send(ranks[fault.rank], {**ASKED, **STOPS}[fault.kind]):
            return  # it has just ended
        self._decks["sent"].pop()
        self.happen(fault, watch)
        if fault.kind == "slow":
            time.sleep(self.random.uniform(1, 4))
            send(ranks[fault.rank], signal.SIGCONT)

    def happen(self, fault: Fault, watch: Watch) -> None:
        watch.look()
        fault.step, fault.at, fault.clock = watch.step, watch.step, time.monotonic()
        fault.when, fault.lost_before = fault.clock - self.began, self.results.lost
        self.results.faults.append(fault)
        self.open = fault

    # ------------------------------------------------------------------------------------------------ what is said

    def problem(self, text: str, launch: Launch | None = None) -> None:
        self.results.problems.append(text)
        print(f"\nPROBLEM: {text}\n{launch.tail() if launch else ''}", file=sys.stderr, flush=True)

    def tell(self, what: str) -> None:
        """A line of progress: on a terminal in place, else every ten seconds."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._told < (0.5 if terminal else 10):
            return
        self._told = now
        r, seconds = self.results, int(now - self.began)
        survived = sum(fault.seconds is not None for fault in r.faults)
        text = f"{seconds // 60}:{seconds % 60:02} of {self.minutes:g}:00, {what}, {len(r.faults)} faults, {survived} survived, "
        text += f"{r.lost} steps lost"
        text += f", now: {self.open}" if self.open else ""
        print(f"\r{text[:150]:<150}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train under a fault injector; compare with a run that nothing disturbed."
    )
    parser.add_argument(
        "--minutes", type=float, default=60, help="how long; below 10, at a size that says nothing of the metric"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--epochs", type=int, default=None, help="of the run (one a minute, at least 12, if not given)")
    parser.add_argument("--rows", choices=("memory", "files"), default="memory", help="where class rows are")
    parser.add_argument(
        "--timeout", type=int, default=20, help="train.timeout in seconds: more on a machine with much other work"
    )
    parser.add_argument("--part", type=float, default=120, help="begin no round after so many minutes of this command")
    parser.add_argument("--out", default="runs/soak", help="where the report goes; a soak that is there goes on")
    asked = parser.parse_args()
    out = Path(asked.out).absolute()
    if out.exists() and any(out.iterdir()) and not (out / "asked").exists():
        parser.error(f"{out} holds something else")
    out.mkdir(parents=True, exist_ok=True)
    (out / "asked").write_text(" ".join(sys.argv[1:]) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it all that it has started
    with Disk(out / "disk", 96) as disk:
        soak = Soak(asked, out, disk)
        reference = soak.reference()
        complete = soak.soak(reference)
    if not complete:
        print("this part is over: the same command goes on", file=sys.stderr)
        return 75
    soak.results.minutes = (time.monotonic() - soak.began) / 60
    print(write_report(soak.results, reference, soak.memory, out))
    return 1 if soak.results.problems else 0


if __name__ == "__main__":
    sys.exit(main())
