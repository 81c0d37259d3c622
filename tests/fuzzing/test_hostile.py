"""Hostile files: what was found by fuzzing, valid files and some damaged ones go through every reader again.

benchmarks/hostile.py                finds more, with coverage as its guide
tests/fuzzing/found/READER/          what it found, as it was found
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guards import Trial, guard
from readers import READERS, Reader

from partial_fc.training.errors import UserError

FOUND = Path(__file__).parent / "found"
DAMAGED = 12  # inputs of each reader that are a valid one with some bytes changed or missing


def damaged(seeds: list[bytes], name: str) -> list[bytes]:
    draw, found = random.Random(name), list[bytes]()
    for number in range(DAMAGED):
        data = bytearray(draw.choice(seeds))
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.randint(1, 4)):
            if data:
                data[draw.randrange(len(data))] = draw.choice((0, 0xFF, 0x80, ord("9"), ord("-"), draw.randrange(256)))
        found.append(bytes(data))
    return found


ODD: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, "x", "../x", [], ["x"], {}, {"x": 1})
MOST = {"checkpoint-values": 60}  # changed files, spread over the content: each of them makes a checkpoint
MOST_OF_OTHERS = 240


def with_odd_values(data: bytes) -> list[bytes]:
    """A JSON file, or one with JSON in each line, with one value after the other replaced or left out."""
    try:
        content = [json.loads(line) for line in data.splitlines()] if b"\n{" in data else json.loads(data)
    except ValueError:
        return []
    found = []
    for place in places(content):
        for odd in (*ODD, LEFT_OUT):
            changed = copy.deepcopy(content)
            *way, last = place
            inner = changed
            for step in way:
                inner = inner[step]
            if odd is LEFT_OUT:
                del inner[last]
            else:
                inner[last] = odd
            lines = [json.dumps(each) for each in changed] if b"\n{" in data else [json.dumps(changed)]
            found.append(("\n".join(lines) + "\n").encode())
    found += [json.dumps(odd).encode() for odd in ODD]
    return found


LEFT_OUT = object()


def places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(min(2, len(content))):
            yield (*way, key)
            yield from places(content[key], (*way, key))


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if ".json" in reader.file])
@pytest.mark.filterwarnings("ignore")  # of torch, about odd states
def test_odd_values_of_a_json_file_are_read_or_refused(tmp_path, name):
    trial = Trial(READERS[name], tmp_path)
    wrong: dict[str, bytes] = {}
    changed = with_odd_values(trial.seeds[0])
    assert changed
    for data in changed[:: -(-len(changed) // MOST.get(name, MOST_OF_OTHERS))]:
        if said := trial.of(data):
            wrong.setdefault(said, data[:3000])
    assert not wrong, "\n".join(f"{said}\n    {data!r}" for said, data in wrong.items())


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")  # of Pillow and torch, about damaged files
def test_a_hostile_file_is_read_or_refused_by_its_name(tmp_path, name):
    trial = Trial(READERS[name], tmp_path)  # reads the valid ones
    for number, data in enumerate(trial.seeds):
        assert trial.of(data) == "", f"valid file {number}"
    for number, data in enumerate([*damaged(trial.seeds, name), b"", b"\0" * 64, b"[" * 20_000]):
        assert trial.of(data) == "", f"{number}: {data[:200]!r}"
    for path in sorted((FOUND / name).glob("*")):
        assert trial.of(path.read_bytes()) == "", path.name


def test_what_was_found_is_of_a_reader():
    assert {path.name for path in FOUND.iterdir()} <= set(READERS)


BAD = {
    "a command": (lambda path: os.system("true"), "os.system"),
    "a process": (lambda path: subprocess.run([sys.executable, "-c", ""]), "subprocess.Popen"),
    "code": (lambda path: exec(compile("1", "a file", "exec")), "code of 'a file' was run"),
    "a file elsewhere": (lambda path: (path.parents[1] / "elsewhere").write_text(""), "elsewhere"),
    "a secret": (lambda path: Path("/etc/hostname").read_text(), "/etc/hostname"),
    "a removal": (lambda path: os.remove(path.parents[1] / "elsewhere"), "os.remove"),
    "another error": (lambda path: [][1], "another kind: IndexError"),
    "no name": (lambda path: int("x"), "without a name: ValueError"),
    "memory": (lambda path: bytearray(os.urandom(1 << 20) * 600), "MiB more"),
}


@pytest.mark.parametrize("what", BAD)
def test_the_guard_sees(tmp_path, what):
    """And what a reader swallows is seen nevertheless."""
    (tmp_path / "elsewhere").write_text("")
    action, words = BAD[what]

    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("x")

    def read(folder: Path) -> None:
        if (folder / "file").read_bytes() == b"y":
            action(folder)

    assert words in Trial(Reader(prepare, "file", read), tmp_path / "a").of(b"y")
    assert guard().folder == "", "it looks no more"


def test_named_refusals_are_fine(tmp_path):
    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("x")

    def refuse(folder: Path) -> None:
        if (folder / "file").read_bytes() == b"y":
            raise UserError(f"{folder / 'file'} is damaged")

    assert Trial(Reader(prepare, "file", refuse), tmp_path).of(b"y") == ""
