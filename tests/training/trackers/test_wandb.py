"""Weights & Biases with its real package, offline: what the file that `wandb sync` would send has in it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from common import needs
from launched import tiny_run

from partial_fc.training.cli.main import main
from partial_fc.training.run import RunFolder

pytestmark = [needs("wandb"), pytest.mark.timeout(300)]
KEY = "0123456789abcdefghij0123456789abcdefghij"
BLOCK = 32768


def records(run: Path) -> list[Any]:
    """The records of the newest file: blocks of (checksum, size, kind), as LevelDB's logs have them."""
    from wandb.proto.wandb_internal_pb2 import Record

    path = max(run.glob("wandb/*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    data, at, part, found = path.read_bytes(), 7, b"", []
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, its last part
            found.append(Record.FromString(part))
            part = b""
    return found


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(each, kind) for each in found if each.WhichOneof("record_type") == kind]


def rows(found: list[Any]) -> dict[int, dict[str, Any]]:
    return {
        each.step.num: {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.item}
        for each in of_kind(found, "history")
    }


@pytest.mark.slow  # alone in its process: what else has used wandb there decides where it writes
def test_a_run_and_its_continuation(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = tmp_path / "run"
    config = tiny_run(tmp_path, train={"epochs": 2, "timeout": 600.0})
    arguments = ["train", str(config), "--output.folder", str(run), "--output.trackers", "[wandb]"]
    assert main([*arguments, "--output.project", "tests"]) == 0
    found = records(run)
    (about,) = of_kind(found, "run")
    link = json.loads((run / "trackers.json").read_text())["wandb"]["link"]
    assert (about.run_id, about.project, about.display_name) == (link["id"], "tests", "run")
    settings = {item.key: json.loads(item.value_json) for each in of_kind(found, "config") for item in each.update}
    assert settings["head.margin"] == "ArcFace" and settings["head.margin.scale"] == 16.0
    history = RunFolder(run).history()
    sent = rows(found)
    assert sorted(sent) == [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [sent[row["step"]]["loss"] for row in history] == [row["loss"] for row in history]
    (artifact,) = of_kind(found, "artifact")
    assert artifact.type == "report" and "report.html" in [each.path for each in artifact.manifest.contents]
    assert sent[6]["plots/training._type"] == "images/separated"

    # the run is resumed from its end: one more start in the same tracked run, which has all of its rows already
    assert main(["train", "--resume", str(run)]) == 0
    found = records(run)
    (about,) = of_kind(found, "run")
    assert about.run_id == link["id"] and not any("loss" in row for row in rows(found).values())

    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    for path in run.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
