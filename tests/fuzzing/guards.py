"""What a reader of a hostile file must not do, seen by an audit hook: run code, start processes, open sockets, touch
files elsewhere; and what it must not take: memory and time.

    Trial(reader, folder).of(data)      "" where the bytes were read or refused as they should be; else what happened
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import traceback
from pathlib import Path
from typing import Any

import readers
from readers import Reader

from partial_fc.training.errors import UserError

MOST_MEMORY = 256 << 20  # that one input may add to the largest memory so far
REFUSALS = (ValueError, OSError, UserError)
PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
PLACES = (
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
UNPICKLED = ("torch", "collections", "pathlib", "_codecs")  # whose names weights_only, or our unpicklers, allow
ROOT = Path(__file__).parents[2]
CODE = tuple(
    {str(Path(place).resolve()) for place in (*sys.path, *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix) if place}
    | {str(ROOT)}
)  # fmt: skip
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")


class Forbidden(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


class Guard:
    """The audit hook of this process; it looks only while `folder` is set."""

    def __init__(self) -> None:
        self.folder, self.reads_elsewhere = "", False
        self.known: set[str] = set()
        self.seen: list[str] = []
        self.thread = 0
        sys.addaudithook(self.hook)

    def arm(self, folder: Path, reads_elsewhere: bool = False) -> None:
        self.reads_elsewhere = reads_elsewhere
        self.known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
        self.seen, self.thread, self.folder = [], threading.get_ident(), str(folder.resolve())

    def disarm(self) -> list[str]:
        self.folder = ""
        return self.seen

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or threading.get_ident() != self.thread:
            return
        problem = self.problem(event, arguments)
        if problem:
            self.seen.append(problem)
            raise Forbidden(problem)

    def problem(self, event: str, arguments: tuple[Any, ...]) -> str:
        if event in PROCESSES or (event.startswith("socket.") and event != "socket.gethostname"):
            return f"{event} {arguments!r:.200}"
        if event in PLACES:
            return self.of_place(event, arguments)
        if event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            return "" if self.is_code(file) else f"code of {file!r} was run"
        if event == "import" and arguments[0].partition(".")[0] not in self.known:
            return f"{arguments[0]} was imported"
        if event == "pickle.find_class" and not str(arguments[0]).startswith(UNPICKLED):
            return f"a pickle was given {arguments[0]}.{arguments[1]}"
        return ""

    @staticmethod
    def is_code(file: str) -> bool:
        # dataclasses and named tuples make code of text that is theirs
        return file.startswith(("<frozen", "<string>", "<attrs", "<__array_function__", "<lambdify")) or (
            os.path.isabs(file) and file.startswith(CODE)
        )

    def of_place(self, event: str, arguments: tuple[Any, ...]) -> str:
        """Why a place may not be touched; reading what belongs to Python and the system is no matter."""
        path = arguments[0]
        if not isinstance(path, str | bytes):
            return ""
        if b"\0" in os.fsencode(path):
            return ""
        within = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1  # of a folder that is open
        base = os.readlink(f"/proc/self/fd/{within}") if isinstance(within, int) and within >= 0 else os.getcwd()
        real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        if not real or real.startswith((self.folder, os.environ.get("PARTIAL_FC_CACHE", self.folder))):
            return ""
        mode, flags = (arguments[1], arguments[2]) if event == "open" else ("w", 0)
        writes = (
            event != "open" or bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        )
        if not writes and (self.reads_elsewhere or real.startswith((*CODE, *SYSTEM))):
            return ""
        return f"{event} {real} {mode or ''}"


def most_memory(anew: bool = False) -> int:
    """The largest memory of this process, in bytes. anew: from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


_guard: list[Guard] = []


def guard() -> Guard:
    if not _guard:
        _guard.append(Guard())
    return _guard[0]


class Trial:
    """A prepared folder in which a reader is tried again and again."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.seeds = readers.seeds(reader, folder)
        self.here = folder / "here"
        self.path = readers.file_of(reader, self.here)
        self.content = {each: each.read_bytes() for each in self.here.rglob("*") if each.is_file()}
        self.facts = {each: self.fact(each) for each in self.content}
        for seed in self.seeds:  # what is imported late is imported now
            self.path.write_bytes(seed)
            reader.agree(self.here)
            reader.read(self.here)
            self.restore()
        guard()

    @staticmethod
    def fact(path: Path) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def of(self, data: bytes) -> str:
        """What the reader did wrong with these bytes in its file; "" if nothing."""
        memory = most_memory(anew=True)
        guarding = guard()
        try:
            self.path.write_bytes(data)
            self.reader.agree(self.here)
            guarding.arm(self.here, self.reader.reads_elsewhere)
            said = _outcome(self.reader, self.here)
        finally:
            seen = guarding.disarm()
            self.restore()
        grown = most_memory() - memory
        if seen:
            return f"forbidden: {seen[0]}"
        return said or (f"memory: {grown >> 20} MiB more" if grown > MOST_MEMORY else "")

    def restore(self) -> None:
        for each, fact in self.facts.items():
            if each != self.path and self.fact(each) != fact:
                each.parent.mkdir(parents=True, exist_ok=True)
                each.write_bytes(self.content[each])
                self.facts[each] = self.fact(each)


def _outcome(reader: Reader, folder: Path) -> str:
    try:
        reader.read(folder)
    except Forbidden:
        return ""  # it is in the guard's list
    except REFUSALS as error:
        if isinstance(error, UnicodeError) and str(folder) not in str(error):
            return f"a refusal without a name: {_where(error)}"
        named = not reader.names or str(folder) in str(error) or str(folder) in str(getattr(error, "filename", ""))
        return "" if named else f"a refusal without a name: {_where(error)}"
    except BaseException as error:
        return f"an error of another kind: {_where(error)}"
    return ""


def _where(error: BaseException) -> str:
    """The class and words of an error, and the line of ours that it came from."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "partial_fc" in each.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} in {place}: {' '.join(str(error).split())[:300]}"
