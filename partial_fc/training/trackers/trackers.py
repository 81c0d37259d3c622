"""The trackers of a run, and RUN/trackers.json, by which a resumed run continues the tracked runs.

start            new tracked runs, or those of trackers.json; what fails is a UserError, before any training
row              to each tracker, unless it has that step already
results, close   plots and the report; then what was missed is said

trackers.json    {"wandb": {"link": {"id": ...}, "steps": 120, "evaluations": 100}, ...}
steps            the last step of which the tracker has a row of training, evaluations: a row of figures; kept where
                 a run is resumed, because its history is cut back to the checkpoint then
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from partial_fc.training.errors import UserError
from partial_fc.training.files import told, write_atomically
from partial_fc.training.trackers.kinds import KINDS, Kind, Link, Outcome, Own, Place
from partial_fc.training.trackers.secrets import one_line
from partial_fc.training.trackers.sender import Sender
from partial_fc.training.trackers.settings import OwnTracker

TRACKERS = "trackers.json"
START = 120.0  # seconds for trackers to start; at most three quarters of the time that other ranks wait
END = {"FINISHED": 60.0, "FAILED": 5.0, "KILLED": 10.0}  # seconds for what is still to be sent


@dataclass
class Last:
    """The last steps that a tracker has, or a history: of training, and of evaluations."""

    steps: int = 0
    evaluations: int = 0

    def or_later(self, other: Last) -> Last:
        return Last(max(self.steps, other.steps), max(self.evaluations, other.evaluations))

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> Last:
        """Return those of rows of history.jsonl."""
        found = cls()
        for row in history:
            name = "steps" if "loss" in row else "evaluations"
            setattr(found, name, max(getattr(found, name), int(row["step"])))
        return found


@dataclass
class _Open:
    """A tracker that has started. tracker: of Accelerate. has: what it has from before the run was resumed."""

    kind: Kind
    sender: Sender
    link: Link = field(default_factory=dict)
    has: Last = field(default_factory=Last)
    tracker: Any = None
    starting: Callable[[float], tuple[Any, Link]] | None = None


class Trackers:
    """The trackers `names`, and `own`, of the run in `folder`. Only the main process has them.

    project, name: of the tracked runs. timeout: seconds that the other ranks wait for this one.
    """

    def __init__(
        self, names: Sequence[str], own: OwnTracker | None, *, folder: Path, project: str, name: str, timeout: float
    ) -> None:
        self.kinds: list[Kind] = [KINDS[each]() for each in names]
        if own is not None:
            self.kinds.append(Own(own))
        self.folder = folder
        self.project = project
        self.name = name
        self.wait = min(START, 0.75 * timeout)
        self._open: list[_Open] = []

    def prepare(self) -> None:
        """Import what the trackers need. Raises UserError where nobody is logged in."""
        for kind in self.kinds:
            try:
                kind.prepare()
            except Exception as error:  # of an import, whatever it is
                raise _not_started(kind, error) from None

    def start(self, settings: Mapping[str, Any], *, resumed: int | None, has: Last) -> None:
        """Start a tracked run in each tracker; with `resumed`, the step after which the run goes on, continue those of
        trackers.json.

        settings: of the run, by dotted names; a tracked run keeps those that it began with. has: the last steps of the
        history, before it is cut back. Raises UserError for a tracker that does not start.
        """
        saved = {} if resumed is None else self._read()
        deadline = time.monotonic() + self.wait
        for kind in self.kinds:
            before = saved.get(kind.name, {})
            link = before.get("link", {})
            last = Last(before.get("steps", 0), before.get("evaluations", 0)).or_later(has)
            opened = _Open(kind, Sender(kind.name), link, last if link else Last())
            place = Place(self.folder, self.project, self.name, link, resumed or 0)
            opened.starting = opened.sender.ask(partial(_start, kind, place, settings))
            self._open.append(opened)
        try:
            for each in self._open:
                self._wait(each, deadline)
                # of each at once: one that has started is found again even if the next one fails
                saved[each.kind.name] = {"link": each.link, **asdict(each.has)}
                write_atomically(self.folder / TRACKERS, (json.dumps(saved, indent=1) + "\n").encode())
        except (UserError, OSError):
            self.close("FAILED")
            raise

    def row(self, row: Mapping[str, float], step: int) -> None:
        """Send a row of the history."""
        for each in self._open:
            has = each.has.steps if "loss" in row else each.has.evaluations
            if each.kind.repeats or step > has:
                each.sender.post(partial(each.tracker.log, each.kind.row(row), step=step), "row", step)

    def results(self, plots: Sequence[Path], report: Path, step: int) -> None:
        """Send the plots and the report of a run that has ended."""
        for each in self._open:
            for path in plots:
                each.sender.post(partial(each.kind.picture, each.tracker, path, step), f"picture {path.name}")
            each.sender.post(partial(each.kind.report, each.tracker, report), report.name)

    def close(self, outcome: Outcome) -> None:
        """Close all tracked runs, and say what they have missed."""
        while self._open:
            each = self._open.pop(0)
            if each.tracker is not None:
                each.sender.close(partial(each.kind.finish, each.tracker, outcome), END[outcome])

    def _wait(self, opened: _Open, deadline: float) -> None:
        assert opened.starting is not None
        try:
            opened.tracker, opened.link = opened.starting(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            slow = TimeoutError(f"no answer within {self.wait:.0f} seconds")
            raise _not_started(opened.kind, slow) from None
        except Exception as error:
            hint = f"to begin a new tracked run, remove {self.folder / TRACKERS}" if opened.link else ""
            raise _not_started(opened.kind, error, hint) from None

    def _read(self) -> dict[str, Any]:
        path = self.folder / TRACKERS
        if not path.exists():
            return {}
        with told(path, again="remove it to begin new tracked runs"):
            found = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): {"link": dict(each["link"]), **_steps(each)} for name, each in found.items()}


def _start(kind: Kind, place: Place, settings: Mapping[str, Any]) -> tuple[Any, Link]:
    """Return a tracker that has started, and its link."""
    tracker: Any = kind.make(place)
    tracker.start()
    if not place.link:
        kind.configure(tracker, settings)
    return tracker, kind.link(tracker)


def _not_started(kind: Kind, error: Exception, hint: str = "") -> UserError:
    """Return what to raise, from None: what it comes from may hold secrets."""
    parts = (f"the tracker {kind.name} does not start: {one_line(error)}", hint)
    return UserError("; ".join((*filter(None, parts), "to do without, leave it out of --output.trackers")))


def _steps(saved: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(saved[name]) for name in ("steps", "evaluations")}
