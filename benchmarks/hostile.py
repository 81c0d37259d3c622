"""Hostile files: coverage-guided fuzzing of every reader of files that is ours, by atheris (extra `fuzz`).

    python benchmarks/hostile.py --list
    python benchmarks/hostile.py --reader recordio --minutes 10
    python benchmarks/hostile.py --minutes 10          all readers in turn; again, it goes on where it stopped
    python benchmarks/hostile.py --table               what was run so far, as the table of docs/untrusted.md
    python benchmarks/hostile.py --reader tar --input FILE      one input, without atheris

Each reader runs in a process of its own, with a limit of memory and of time for each input, and an audit hook
(tests/fuzzing/guards.py) that sees code, processes, sockets and files elsewhere. What is wrong is written to
OUT/found/READER-N and told; put it into tests/fuzzing/found/READER/, which the tests run again. The corpus grows in
OUT/corpus/READER.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in ("tests/fuzzing", "tests/support", "."):
    sys.path.insert(0, str(ROOT / place))

MOST_BYTES = 1 << 15  # of an input
SECONDS = 20  # for one input, on a machine that is busy
MEMORY = 3 << 30  # that a process may add to what it has after its imports
STATE = "state.json"
NOTHING: dict[str, Any] = {"seconds": 0.0, "executions": 0, "coverage": 0, "found": []}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="which; may be given several times (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader")
    parser.add_argument("--list", action="store_true", help="the names of the readers")
    parser.add_argument("--table", action="store_true", help="what was run so far")
    parser.add_argument("--input", type=Path, help="try the bytes of this file on the reader")
    parser.add_argument("--out", type=Path, default=Path("runs/hostile"), help="corpus, findings and state")
    return parser.parse_args()


def state_of(out: Path) -> dict[str, Any]:
    path = out / STATE
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    given = options()
    if given.table:
        print(table(state_of(given.out)))
        return 0
    if given.list or given.input:
        from readers import READERS

        if given.list:
            print("\n".join(READERS))
            return 0
        return one_input(given.reader[0], given.input)
    return campaign(given.reader, given.minutes, given.out.resolve())


def campaign(names: list[str] | None, minutes: float, out: Path) -> int:
    """Run each reader until it has had its time; note what was run."""
    import atheris
    import torch  # noqa: F401 (not to be instrumented)

    with atheris.instrument_imports(include=["partial_fc.training", "partial_fc.weights", "partial_fc.checkpoint"]):
        from guards import Trial
        from readers import READERS
    (out / "found").mkdir(parents=True, exist_ok=True)
    names = names or list(READERS)
    for name in names:
        while minutes * 60 - state_of(out).get(name, NOTHING)["seconds"] > 1:
            before = state_of(out).get(name, NOTHING)
            log, started = out / "found" / f"{name}.log", time.monotonic()
            pid = os.fork()  # of a process that has imported everything
            if not pid:
                try:
                    with log.open("wb") as file:
                        os.dup2(file.fileno(), 1)
                        os.dup2(file.fileno(), 2)
                    fuzz(atheris, Trial, READERS[name], name, minutes * 60 - before["seconds"], out)
                finally:
                    os._exit(1)
            failed = os.waitpid(pid, 0)[1]
            if not note(name, log.read_text(errors="replace"), failed, time.monotonic() - started, before, out):
                break
    print(table({name: each for name, each in state_of(out).items() if name in names}))
    return 1 if any(each["found"] for each in state_of(out).values()) else 0


def note(name: str, said: str, failed: int, seconds: float, before: dict[str, Any], out: Path) -> bool:
    """Add what one process did to the state; False if it did nothing."""
    counted = [int(each) for each in re.findall(r"^#(\d+)\s", said, re.M)]
    covered = [int(each) for each in re.findall(r"\bcov: (\d+)", said)]
    found = {*before["found"], *re.findall(r"^FOUND (.*)$", said, re.M)}
    if failed:  # libFuzzer stopped: a hang, no memory, a crash
        words = re.findall(r"ERROR: libFuzzer: ([^\n]*)", said)
        found.add(words[-1] if words else f"the process ended, see {name}.log")
    state = state_of(out)
    spent = [float(each) for each in re.findall(r"^Done \d+ runs in (\d+) second", said, re.M)]
    state[name] = {
        "seconds": before["seconds"] + (spent[-1] if spent else seconds),
        "executions": before["executions"] + max(counted, default=0),
        "coverage": max([before["coverage"], *covered]),
        "found": sorted(found),
    }
    (out / STATE).write_text(json.dumps(state, indent=1))
    print(name, json.dumps(state[name]), flush=True)
    return bool(counted)


def fuzz(atheris: Any, trial_of: Any, reader: Any, name: str, seconds: float, out: Path) -> None:
    """The process of one reader; it does not return."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    os.environ["PARTIAL_FC_CACHE"] = str(folder / "cache")
    trial = trial_of(reader, folder)
    corpus, start = out / "corpus" / name, folder / "seeds"
    for each in (corpus, start):
        each.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(trial.seeds):
        (start / str(number)).write_bytes(seed)
    known: set[str] = set()

    def try_one(data: bytes) -> None:
        said = trial.of(data)
        if said and (kind := kind_of(said)) not in known:
            known.add(kind)
            (out / "found" / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            print(f"\nFOUND {kind}", flush=True)

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    arguments = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEMORY >> 20}",
        f"-artifact_prefix={out / 'found'}/{name}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(start)], try_one)
    atheris.Fuzz()


def kind_of(said: str) -> str:
    """What is alike in two findings: their words without texts and numbers of the input."""
    return re.sub(r"/tmp/\S+|'[^']*'|0x[0-9a-f]+|\d{3,}", "…", said)[:160]


def one_input(name: str, path: Path) -> int:
    from guards import Trial
    from readers import READERS

    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARTIAL_FC_CACHE"] = str(Path(folder) / "cache")
        said = Trial(READERS[name], Path(folder)).of(path.read_bytes())
    print(said or "it is read, or refused as it should be")
    return 1 if said else 0


def table(state: dict[str, Any]) -> str:
    lines = ["| reader | seconds | executions | coverage | found |", "|---|---|---|---|---|"]
    for name, one in state.items():
        found = "; ".join(one["found"]).replace("|", "\\|") or "–"
        lines.append(f"| {name} | {one['seconds']:.0f} | {one['executions']:,} | {one['coverage']:,} | {found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
