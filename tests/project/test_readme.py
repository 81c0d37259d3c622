"""README.md and the first pages are true: their Python runs, commands and files exist, the diff is the example."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from partial_fc.training.cli.main import train_parser
from partial_fc.training.config import to_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIRST = ["README.md", "docs/install.md", "docs/quickstart.md", "docs/own-loop.md", "docs/application.md"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [
        line for page in FIRST for block in blocks("bash", (ROOT / page).read_text()) for line in block.splitlines()
    ]
    return [shlex.split(line, comments=True) for line in dict.fromkeys(lines) if line.strip()]


def test_the_first_lines_of_the_documentation_run():
    """With a head of 2,000 classes instead of two million."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(8, 512)
    names = {
        "torch": torch,
        "backbone": backbone,
        "optimizer": torch.optim.SGD(backbone.parameters(), lr=0.1),
        "images": torch.randn(4, 8),
        "labels": torch.randint(0, 2000, (4,)),
    }
    before = backbone.weight.detach().clone()
    (block,) = blocks("python", (ROOT / "docs/index.md").read_text())
    exec(compile(block.replace("2_000_000", "2_000"), "index.md", "exec"), names)
    assert not torch.equal(backbone.weight, before)


def test_the_loop_in_one_process_says_what_took_part(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python", (ROOT / "docs/own-loop.md").read_text())[0], "own-loop.md", "exec"), {})
    assert "of 1000 classes took part" in capsys.readouterr().out


PAGES = [
    "own-loop.md",
    "margins.md",
    "cost-model.md",
    "losses.md",
    "classes.md",
    "checkpoints.md",
    "queries.md",
    "protocols.md",
    "faults.md",
    "nonfinite.md",
    "backbones.md",
    "trackers.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_other_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python", (ROOT / "docs" / page).read_text())
    assert found
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_the_two_commands_come_first():
    first = blocks("bash")[0].splitlines()
    assert [line.split()[0] for line in first] == ["launch/quickstart", "launch/test"]
    assert README.index("```bash") < README.index("## In your own loop") < README.index("## The tree")


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_can_be_given(command):
    program, *arguments = command
    if program.startswith("launch/"):
        assert (ROOT / program).stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(ROOT / program)], check=True)
    elif program == "pip":
        assert arguments[0] == "install"
    elif program == "accelerate":
        assert (ROOT / arguments[arguments.index("--config_file") + 1]).is_file()
        assert (ROOT / arguments[-1]).is_file()
    else:
        assert program == "partial-fc"
        if arguments[0] == "train" and "--resume" not in arguments and "--help" not in arguments:
            to_config(train_parser(), ["--config", str(ROOT / arguments[1]), *arguments[2:]])


def test_the_diff_is_the_example():
    example = (ROOT / "examples/ddp.py").read_text()
    assert blocks("diff") == blocks("diff", (ROOT / "docs/own-loop.md").read_text())
    added = [line[1:].strip() for line in blocks("diff")[0].splitlines() if line.startswith("+")]
    assert len(added) == 7
    for line in added:
        assert line in example or line.startswith("from partial_fc import"), line


def test_the_tree_and_the_links_exist():
    tree = blocks("text")[0]
    folder = ""
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        path = ROOT / (folder + name if line.startswith(" ") else name)
        assert path.exists(), path
        listed.add(path)
    missing = set((ROOT / "partial_fc").glob("[a-z]*.py")) - listed
    assert not missing, f"not in the README's tree: {missing}"
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
