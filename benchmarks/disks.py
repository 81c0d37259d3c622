"""Bad disks: every writer and reader of files under every fault of a disk, and what comes of it.

    python benchmarks/disks.py --list                  what there is
    python benchmarks/disks.py                         all of it, in hours; goes on where it was stopped
    python benchmarks/disks.py --only 'gallery*'       some of it
    python benchmarks/disks.py --report                the tables of what was run

Each work (a command, or ranks of the core) is done once undisturbed while a library that stands before the calls of the
C library (tests/support/bad_disk.c) writes down which files it opens, reads, writes, flushes, renames. Then it is done
again from the start for each file and call of that list, which from its first call on fails (ENOSPC, EDQUOT, EIO,
EROFS, ESTALE), for short reads and writes, for a slow disk, in file systems that fill up (tmpfs) and one that becomes
read-only in the middle. A case is right if

    ends        all ranks end by themselves within their time
    words       each with code 2 and without a traceback, the first in one line that has the cause and names the file,
                or the folder of what was read or written; or with code 0 and the results of the undisturbed run
    again       the same command without the fault then gives the results of the undisturbed run
    nothing     is left that the undisturbed run has not left

Exit code 1 if a case is not.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

from bad_disk import BadDisk, Outcome, Rule  # noqa: E402
from launched import tiny_run  # noqa: E402

PAGE = 4096
COMMAND = "partial_fc.training.cli.main:main"
# what a call fails with: what such a call of a disk that is full, broken, read-only or gone does
FAILS = {
    "create": "EROFS",
    "write": "ENOSPC",
    "pwrite": "EDQUOT",
    "fsync": "EIO",
    "rename": "EIO",
    "mkdir": "ENOSPC",
    "truncate": "EIO",
    "allocate": "ENOSPC",
    "link": "EIO",
    "close": "EIO",
    "open": "EIO",
    "read": "EIO",
    "pread": "ESTALE",
    "map": "EIO",
    "written": "EIO",
}
WRITES = "write|pwrite|create|rename|mkdir|link|truncate|allocate"


@dataclass(frozen=True)
class Work:
    """One thing that reads or writes files.

    arguments: {work} is its own folder, {base} one that all share and nobody changes. needs: what of the base is copied
    to its own folder before. files: paths that its faults are for, a glob inside {work} or {base}.
    """

    name: str
    what: str
    arguments: tuple[str, ...]
    target: str = COMMAND
    ranks: int = 1
    group: bool = False
    needs: tuple[str, ...] = ()
    reads: str = ""  # of the base, for faults of reading
    seconds: float = 90.0
    writes: bool = True  # whether it is also tried with what a disk does to writes alone


def core(function: str) -> dict[str, Any]:
    return {"target": f"bad_disk_work:{function}", "ranks": 2, "group": True}


CONVERT = ("recordio", "webdataset", "parquet", "list", "folder")
WORKS = (
    Work("checkpoint", "`Checkpointer`, two ranks: save, remove, load", ("{work}", ""), **core("checkpoints")),
    Work("checkpoint in a thread", "the same, asynchronous", ("{work}", "yes"), **core("checkpoints")),
    Work("rows in files", "`FileRows`, two ranks: steps, all rows, a checkpoint", ("{work}",), **core("rows")),
    Work("weights", "`export_weights`, `import_weights`, two ranks", ("{work}",), **core("weights")),
    Work("train", "a run folder, two ranks", ("train", "{base}/run.yaml", "--output.folder", "{work}/run", "--start_or_resume", "--train.checkpoint_steps", "2"), ranks=2),
    Work("train in a thread", "the same, asynchronous checkpoints", ("train", "{base}/run.yaml", "--output.folder", "{work}/run", "--start_or_resume", "--train.checkpoint_steps", "2", "--train.asynchronous_checkpoints", "true"), ranks=2),
    Work("resume", "a run that goes on, two ranks", ("train", "--resume", "{work}/run", "--train.epochs", "2"), ranks=2, needs=("run",)),
    Work("train glyphs", "the embedded typefaces, evaluations, plots", ("train", "{base}/glyphs.yaml", "--output.folder", "{work}/run", "--start_or_resume"), reads="*/assets/*"),
    Work("evaluate", "figures, curves, plots, report", ("evaluate", "{base}/run", "--data", "{base}/images", "--output", "{work}/evaluation"), reads="{base}/run/*"),
    Work("embed parquet", "embeddings, two ranks", ("embed", "{base}/run", "--data", "{base}/images", "--output", "{work}/embeddings", "--part", "16"), ranks=2),
    Work("embed npz", "embeddings", ("embed", "{base}/run", "--data", "{base}/images", "--output", "{work}/embeddings", "--part", "16", "--files", "npz")),
    Work("gallery build", "a gallery of embeddings", ("gallery", "build", "{work}/people", "--embeddings", "{base}/embeddings"), reads="{base}/embeddings/*"),
    Work("gallery add", "more images of the same", ("gallery", "add", "{work}/people", "--embeddings", "{base}/embeddings", "--existing", "extend"), needs=("people",)),
    Work("gallery remove", "an identity less", ("gallery", "remove", "{work}/people", "id0"), needs=("people",)),
    Work("gallery search", "a picture is looked up", ("gallery", "search", "{work}/people", "{base}/images/id1/1.png", "--run", "{base}/run", "--results", "{work}/answers.jsonl"), needs=("people",)),
    *(
        Work(f"convert to {format}", "a data set, in parts", ("data", "convert", "{base}/images", "{work}/set", "--format", format, "--part", "20"))
        for format in CONVERT
    ),
    *(
        Work(f"convert from {format}", "a data set is read", ("data", "convert", "{work}/set-" + format, "{work}/out", "--format", "folder", "--on_error", "raise"), needs=(f"set-{format}",), writes=False)
        for format in CONVERT
    ),
    Work("inspect", "a plot of a data set; indices in the cache", ("data", "inspect", "{base}/set-recordio", "--plot", "{work}/plot.png"), reads="{base}/set-recordio/*"),
    Work("export", "class weights", ("export", "{base}/run", "{work}/weights.safetensors"), reads="{base}/run/checkpoints/*"),
    Work("import", "class weights to a checkpoint", ("import", "{base}/weights.safetensors", "--margin.scale", "16", "--output", "{work}/imported"), reads="{base}/weights.safetensors"),
    Work("import rank files", "class weights of another trainer", ("import", "{work}/ranks", "--output", "{work}/imported"), needs=("ranks",)),
    Work("export-backbone", "safetensors and a card", ("export-backbone", "{base}/run", "--output", "{work}/exported", "--formats", "safetensors"), reads="{base}/run/*"),
    Work("export-backbone onnx", "ONNX", ("export-backbone", "{base}/run", "--output", "{work}/exported"), seconds=240),
    Work("embed exported", "an exported backbone is read", ("embed", "{work}/exported", "--data", "{base}/images", "--output", "{work}/embeddings"), needs=("exported",)),
    Work("draw glyphs", "a packed set is drawn from fonts", ("data", "glyphs", "--fonts", "{base}/fonts", "--out", "{work}/drawn", "--scripts", "Latin", "--min_designs", "1", "--holdout_identities", "0.1", "--holdout_designs", "0"), reads="{base}/fonts/*", seconds=240),
    Work("train packed", "a packed set is read", ("train", "{base}/run.yaml", "--data.folder", "{base}/packed", "--data.image_size", "null", "--output.folder", "{work}/run", "--start_or_resume"), reads="{base}/packed/*"),
    Work("audit", "pages and figures of a trained head", ("audit", "{base}/run", "--output", "{work}/audit")),
    Work("report", "a page that compares runs", ("report", "{base}/run", "{base}/run", "--output", "{work}/page.html"), reads="{base}/run/*"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One fault of one work. file: what must be named, without folders; of: the call, or the kind of file system."""

    work: Work
    of: str
    file: str
    rules: tuple[Rule, ...] = ()
    cause: str = ""  # "" if nothing must fail
    disk: int = 0  # bytes of a file system of its own, which the work's folder is in

    @property
    def key(self) -> str:
        return f"{self.work.name} | {self.of} | {self.file}"


class Disks:
    """Runs cases and keeps what came of them."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.base = self.out / "base"
        self.folder = self.out / "work"
        self.results = self.out / "results.jsonl"
        os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
        self.used = 0  # bytes in the folder of a work that nothing has disturbed
        self.disk = BadDisk(self.out / "calls")

    def done(self) -> dict[str, dict[str, Any]]:
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return {row["case"]: row for row in map(json.loads, lines)}

    # ------------------------------------------------------------------------------------------------ the base

    def make_base(self) -> None:
        """What the works read: made once."""
        if (self.base / "made").exists():
            return
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        tiny_run(self.base)
        (self.base / "glyphs.yaml").write_text(
            (ROOT / "configs/quickstart.yaml").read_text() + "\n"  # the last of two values counts
        )
        self._command("train", "{base}/run.yaml", "--output.folder", "{base}/run")
        self._command("embed", "{base}/run", "--data", "{base}/images", "--output", "{base}/embeddings")
        self._command("gallery", "build", "{base}/people", "--embeddings", "{base}/embeddings")
        for format in CONVERT:
            self._command("data", "convert", "{base}/images", "{base}/set-" + format, "--format", format)
        self._command("export", "{base}/run", "{base}/weights.safetensors")
        self._command("export-backbone", "{base}/run", "--output", "{base}/exported", "--formats", "safetensors")
        outcome = self.disk.run("disks_base:make", str(self.base))
        if outcome.codes != [0]:
            sys.exit(f"the base could not be made:\n{outcome.text}")
        (self.base / "made").touch()

    def _command(self, *arguments: str) -> None:
        outcome = self.disk.run(COMMAND, [self._filled(each) for each in arguments], seconds=300)
        if outcome.codes != [0]:
            sys.exit(f"{' '.join(arguments)} failed:\n{outcome.text}")

    def _filled(self, text: str) -> str:
        return text.replace("{work}", str(self.folder)).replace("{base}", str(self.base))

    # ------------------------------------------------------------------------------------------------ one work

    def prepare(self, case: Case | None, work: Work) -> None:
        """An own folder with what the work needs, in a file system of its own if the case has one."""
        self.clear()
        self.folder.mkdir(parents=True)
        if case is not None and case.disk:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={case.disk}", "tmpfs", str(self.folder)]
            subprocess.run(mount, check=True)
        for name in work.needs:
            source = self.base / name
            shutil.copytree(source, self.folder / name) if source.is_dir() else shutil.copy(source, self.folder / name)

    def clear(self) -> None:
        if os.path.ismount(self.folder):
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def do(self, work: Work, rules: tuple[Rule, ...] = (), log: bool = False) -> Outcome:
        filled = [self._filled(each) for each in work.arguments]
        cache = {"PARTIAL_FC_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.out / "tmp")}
        (self.out / "tmp").mkdir(exist_ok=True)
        arguments = [filled] if work.target == COMMAND else filled
        return self.disk.run(
            work.target,
            *arguments,
            rules=rules,
            ranks=work.ranks,
            group=work.group,
            seconds=work.seconds,
            log=log,
            variables=cache,
        )

    def undisturbed(self, work: Work) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """(calls, results) of a work that nothing disturbs."""
        self.prepare(None, work)
        rules = [Rule("none", f"{self.folder}/*")]
        if work.reads:
            rules.append(Rule("none", self._filled(work.reads)))
        outcome = self.do(work, tuple(rules), log=True)
        if any(code != 0 for code in outcome.codes):
            sys.exit(f"{work.name} fails on a sound disk:\n{outcome.text}")
        self.used = size_of(self.folder)
        return list(dict.fromkeys(outcome.calls)), self.state(outcome)

    def state(self, outcome: Outcome) -> dict[str, Any]:
        """What a work has come to: its files by name, and their content where that does not depend on the clock."""
        found: dict[str, Any] = {"files": set(), "content": {}}
        for path in sorted(self.folder.rglob("*")):
            name = masked(str(path.relative_to(self.folder)))
            if (
                path.is_file()
                and path.name not in (".lock",)
                and "tensorboard" not in name
                and not name.startswith("cache/")
            ):
                found["files"].add(name)
                found["content"][str(path.relative_to(self.folder))] = content(path)
        found["said"] = re.findall(r"steps \[.*|^rows .*", outcome.text, re.M)
        return found

    def cases(self, work: Work, calls: list[tuple[str, str]]) -> list[Case]:
        """The faults of a work."""
        found: dict[str, Case] = {}
        for call, path in calls:
            if call not in FAILS or (Path(path).name == ".lock" and call != "create"):
                continue
            inside = path.removeprefix(f"{self.folder}/").removeprefix(f"{self.base}/")
            rule = Rule(call, globbed(path), getattr(errno, FAILS[call]))
            # what a disk cannot give to mapped memory, it cannot give to a read
            rules = (rule, Rule("read|pread", rule.path, errno.EIO)) if call == "map" else (rule,)
            case = Case(work, f"{call}: {FAILS[call]}", masked(inside), rules, os.strerror(rule.error))
            found.setdefault(case.key, case)
        own = f"{self.folder}/*"
        also = self._filled(work.reads) if work.reads else own
        found["short reads"] = Case(
            work,
            "reads of at most 7 bytes",
            "*",
            tuple(Rule("read|pread", p, short=7) for p in dict.fromkeys((own, also))),
        )
        if work.writes:
            found["short writes"] = Case(
                work, "writes of at most 100 bytes", "*", (Rule("write|pwrite", own, short=100),)
            )
            found["slow"] = Case(
                work,
                "a slow disk",
                "*",
                (Rule("fsync", own, delay=1.0, count=4), Rule("write|pwrite", own, delay=0.5, count=4)),
            )
            writes = sum(call in WRITES.split("|") for call, _ in calls)
            for nth in (2, max(3, writes // 2)):
                found[f"ro {nth}"] = Case(
                    work,
                    f"read-only from write {nth} on",
                    "*",
                    (Rule(WRITES, own, errno.EROFS, nth=nth),),
                    os.strerror(errno.EROFS),
                )
            needed = sum(size_of(self.base / name) for name in work.needs)
            for share in (0.1, 0.4, 0.8):
                size = (needed + int((self.used - needed) * share)) // PAGE * PAGE + 4 * PAGE
                found[f"full {share}"] = Case(
                    work, f"a disk with room for {share:.0%}", "*", cause=os.strerror(errno.ENOSPC), disk=size
                )
        return list(found.values())

    def judge(self, case: Case, right: dict[str, Any]) -> dict[str, Any]:
        """Do the work with the fault, then without."""
        work = case.work
        try:
            self.prepare(case, work)
        except OSError as error:  # what the work needs does not fit
            return {
                "case": case.key,
                "work": work.name,
                "of": case.of,
                "file": case.file,
                "came": "no room to begin",
                "wrong": [],
                "words": str(error),
                "seconds": 0,
            }
        outcome = self.do(work, case.rules)
        problems = []
        codes = outcome.codes
        words = [line for line in outcome.text.splitlines() if re.match(r"(partial-fc: )?error: ", line)]
        if None in codes:
            problems.append("does not end")
        elif set(codes) == {0}:
            if not same(self.state(outcome), right):
                problems.append("ends well with other results")
        else:
            if set(codes) != {2}:
                problems.append(f"exit codes {codes}")
            if "Traceback" in outcome.text:
                problems.append("a traceback")
            line = words[0] if words else ""
            if case.cause and case.cause not in line and not (case.disk and "requested and" in line):
                problems.append("the cause is not named")
            if not names(line, case.file, self.folder, self.base):
                problems.append("the file is not named")
        came = "well" if set(codes) == {0} else "words"
        if case.disk:
            subprocess.run(["mount", "-o", f"remount,size={case.disk + (64 << 20)}", str(self.folder)], check=True)
        before = self.state(outcome)
        if (
            None in codes
            or came == "well"
            or (same(before, right) and (work.needs or any("was made" in line for line in words)))
        ):  # done all the same: not to be done twice
            if left := sorted(before["files"] - right["files"]):
                problems.append(f"left: {', '.join(left[:4])}")
        else:
            again = self.do(work)
            if set(again.codes) != {0}:
                problems.append("the same command fails afterwards: " + " ".join(again.text.split())[-300:])
            else:
                state = self.state(again)
                if not same(state, right):
                    problems.append("other results afterwards")
                if left := sorted(state["files"] - right["files"]):
                    problems.append(f"left: {', '.join(left[:4])}")
        self.clear()
        said = words[0] if words else " ".join(outcome.text.split())[-400:]
        said = said.replace(str(self.folder), "WORK").replace(str(self.base), "BASE")
        return {
            "case": case.key,
            "work": work.name,
            "of": case.of,
            "file": case.file,
            "came": came,
            "wrong": problems,
            "words": said if came != "well" or problems else "",
            "seconds": round(outcome.seconds, 1),
        }


# ---------------------------------------------------------------------------------------------------- what is compared


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder with all that is in it, in whole pages and with one for each name."""
    files = [path, *path.rglob("*")]
    return sum(-(-each.stat().st_size // PAGE) * PAGE if each.is_file() else PAGE for each in files)


def masked(name: str) -> str:
    """A name without what differs from run to run."""
    name = re.sub(r"events\.out\S*", "events", name)
    name = re.sub(r"(?<=[-.])[0-9a-z_]{8,12}(?=\.tmp|/|$)", "#", name) if re.search(r"(^|/)\.", name) else name
    name = re.sub(r"call-\d+-\w+", "call", name)
    return re.sub(r"\d+", "#", name)


def globbed(path: str) -> str:
    """The same of a path, as a glob."""
    path = re.sub(r"([\[?*])", r"[\1]", path)
    folder, _, name = path.rpartition("/")
    return f"{re.sub(r'(/[.][^/]*-)[0-9a-z_]{8}(?=/|$)', r'[1]*', folder)}/{re.sub(r'[0-9a-f]{12}(?=[.]tmp)|[0-9]+', '*', name)}"


IGNORED = (
    "seconds",
    "images_per_second",
    "data_wait",
    "name",
    "created",
    "run",
    "source",
    "sha256",
    "config_sha256",
    "since",
    "step_seconds",
)


def content(path: Path) -> str | None:
    """A digest of a file whose content is the same in each run; None for others."""
    if path.suffix in (".json", ".jsonl"):
        try:
            rows = (
                [json.loads(line) for line in path.read_text().splitlines()]
                if path.suffix == ".jsonl"
                else json.loads(path.read_text())
            )
        except ValueError:
            return "damaged"
        return hashlib.sha256(json.dumps(without_clock(rows), sort_keys=True).encode()).hexdigest()
    if (
        path.suffix in (".html", ".png", ".yaml", ".md", ".distcp", ".metadata", ".arrow", ".onnx", ".data")
        or path.name == ".metadata"
    ):
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        files = value.get("files")  # of a checkpoint: their sizes depend on how times are spelled
        if isinstance(files, dict):
            value = {**value, "files": sorted(files)}
        return {k: without_clock(v) for k, v in value.items() if k not in IGNORED}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def same(found: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether all files of the undisturbed run are there with its content; others may be."""
    if found["said"] != right["said"] or not right["files"] <= found["files"]:
        return False
    return all(
        found["content"].get(name) == value
        for name, value in right["content"].items()
        if value is not None and "manifest" not in name
    )


def names(line: str, file: str, folder: Path, base: Path) -> bool:
    """Whether an error names the file, or a folder of it."""
    if file == "*":
        return str(folder) in line or str(base) in line
    shown = re.sub(r"(^|/)\.([^/]*?)(\.#)?\.tmp$", r"\1\2", file)  # a hidden file is named by what it is to become
    parts = [part for part in re.split(r"[#/]", shown) if len(part) > 2]
    return any(part in line for part in parts)


# ---------------------------------------------------------------------------------------------------- the report


def report(rows: list[dict[str, Any]]) -> str:
    """Tables: each work, then what is wrong."""
    what = {work.name: work.what for work in WORKS}
    lines = ["| work | cases | ends in words, then goes on | not disturbed | wrong |", "|---|---|---|---|---|"]
    for name in what:
        mine = [row for row in rows if row["work"] == name]
        if mine:
            wrong = sum(bool(row["wrong"]) for row in mine)
            well = sum(row["came"] == "well" and not row["wrong"] for row in mine)
            lines.append(f"| {name}: {what[name]} | {len(mine)} | {len(mine) - wrong - well} | {well} | {wrong} |")
    lines += ["", "| work | file | fault | what it says |", "|---|---|---|---|"]
    for row in rows:
        if not row["wrong"]:
            said = row["words"] or "(nothing: the result is that of a sound disk)"
            lines.append(f"| {row['work']} | `{row['file']}` | {row['of']} | {said.replace('|', '/')} |")
    lines += [
        "",
        *(f"WRONG {row['case']}: {'; '.join(row['wrong'])}\n      {row['words']}" for row in rows if row["wrong"]),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the works and stop")
    parser.add_argument("--only", default="*", metavar="GLOB", help="works to do")
    parser.add_argument("--of", default="*", metavar="GLOB", help="faults to do")
    parser.add_argument("--file", default="*", metavar="GLOB", help="files whose faults to do")
    parser.add_argument("--again", action="store_true", help="do those again that were wrong")
    parser.add_argument("--report", action="store_true", help="print the tables of what was run and stop")
    parser.add_argument("--out", default="runs/disks", help="folder of results and work")
    asked = parser.parse_args()
    out = Path(asked.out)
    if asked.list:
        for work in WORKS:
            print(f"{work.name:24} {work.what}")
        return 0
    disks = Disks(out)
    with disks.disk:
        if not asked.report:
            disks.make_base()
            run(disks, asked)
        rows = list(disks.done().values())
    print(report(rows))
    return 1 if any(row["wrong"] for row in rows) else 0


def run(disks: Disks, asked: argparse.Namespace) -> None:
    for work in WORKS:
        if not fnmatch.fnmatch(work.name, asked.only):
            continue
        calls, right = disks.undisturbed(work)
        for case in disks.cases(work, calls):
            before = disks.done().get(case.key)
            chosen = fnmatch.fnmatch(case.of, asked.of) and fnmatch.fnmatch(case.file, asked.file)
            if not chosen or (before and not (asked.again and before["wrong"])):
                continue
            row = disks.judge(case, right)
            with disks.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            state = "WRONG " + "; ".join(row["wrong"]) if row["wrong"] else row["came"]
            print(
                f"{row['case']}: {state} ({row['seconds']} s) {row['words'] if row['wrong'] else ''}",
                file=sys.stderr,
                flush=True,
            )
    with contextlib.suppress(FileNotFoundError):
        disks.clear()


if __name__ == "__main__":
    sys.exit(main())
