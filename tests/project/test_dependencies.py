"""docs/dependencies.md and pyproject.toml list the same packages, extras have what modules import and no more, and the
hashes are those of the pinned versions."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs/dependencies.md").read_text()
OWN = re.compile(r"partial_fc\[([\w,]+)\]")
MODULES = {  # import -> package, where the names differ
    "PIL": "pillow",
    "docstring_parser": "docstring-parser",
    "faiss": "faiss-cpu",
    "freetype": "freetype-py",
    "onnx_ir": "onnx-ir",
    "torch_optimizer": "torch-optimizer",
    "yaml": "pyyaml",
}
UNIMPORTED = "not imported"
UNPINNED = {
    "mlflow": "asks for pyarrow before 26 and, by mlflow-skinny, importlib_metadata before 10",
    "triton": "comes with a torch for CUDA, in the version that it was built with",
    "timm": "needs the torchvision of the build of torch",
}
"""Packages that constraints.txt leaves out, and why, as the page says it."""


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=; ]", requirement)[0]


def own_packages(requirements: list[str]) -> list[str]:
    """Requirements without the extras of this project that they include."""
    return [each for each in requirements if not OWN.fullmatch(each)]


def included(requirements: list[str]) -> set[str]:
    return {extra for each in requirements if (found := OWN.fullmatch(each)) for extra in found[1].split(",")}


EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SECTIONS = {
    section.split("\n", 1)[0]: section
    for section in PAGE.partition("## Packages")[2].partition("\n## ")[0].split("\n### ")[1:]
}


def rows(section: str) -> dict[str, list[str]]:
    """Requirement -> the other cells of its row."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def imports() -> set[tuple[Path, str]]:
    """(module, package) of every import outside the standard library, torch and this package."""
    found = set()
    for path in sorted((ROOT / "partial_fc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in {each.partition(".")[0] for each in names} - sys.stdlib_module_names - {"torch", "partial_fc"}:
                found.add((path, MODULES.get(name, name)))
    return found


@pytest.mark.parametrize("extra", ["default", *EXTRAS])
def test_the_page_lists_what_is_required(extra):
    requirements = EXTRAS.get(extra, PROJECT["dependencies"])
    found = rows(extra)
    assert sorted(found) == sorted(own_packages(requirements))
    for requirement, (why, without, licence) in found.items():
        assert why and licence and (without or requirement.startswith("types-")), requirement
    adds = re.search(r"^Adds to ((?:`\w+`(?:, )?)+)", SECTIONS[extra], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", adds[1]) if adds else ()) == included(requirements)


def test_the_page_has_no_other_extra():
    assert list(SECTIONS) == ["default", *EXTRAS]


def test_an_extra_does_not_repeat_what_it_includes():
    for extra, requirements in EXTRAS.items():
        brought = {name_of(each) for inner in included(requirements) for each in own_packages(EXTRAS[inner])}
        assert not brought & {name_of(each) for each in own_packages(requirements)}, extra


def test_packages_that_nothing_imports_say_what_they_are_for():
    imported = {package for _, package in imports()}
    for extra in EXTRAS.keys() - {"test"}:
        for requirement, (why, *_) in rows(extra).items():
            package = name_of(requirement)
            assert (package in imported) != why.startswith(UNIMPORTED), f"{extra}: {package}"


def test_every_import_is_in_an_extra_that_its_error_names():
    """Of the application `train` need not be named: without it the command says so at once."""
    for path, package in sorted(imports()):
        parts = path.relative_to(ROOT / "partial_fc").parts
        application = parts[0] == "training"
        depth = len(parts[:-1]) if len(parts) < 3 else 1 + application
        folder = ROOT.joinpath("partial_fc", *parts[:depth])
        alone = application and len(parts) == 2
        said = "".join(each.read_text() for each in (folder.glob("*.py") if alone else folder.rglob("*.py")))
        extras = [extra for extra, each in EXTRAS.items() if package in map(name_of, own_packages(each))]
        assert extras, f"{path}: no extra has {package}"
        assert (
            (application and "train" in extras)
            or any(f"partial_fc[{extra}]" in said for extra in extras)
            or f"pip install {package}" in said
        ), f"{path}: say partial_fc[{' or '.join(extras)}] where {package} is missing"


def test_every_requirement_is_pinned_and_every_pin_has_a_hash():
    hashes: dict[str, Any] = runpy.run_path(str(ROOT / ".ci/hashes.py"))
    pins = hashes["pins"]()
    wanted = {name_of(each) for extra in EXTRAS.values() for each in own_packages(extra)}
    assert {name for name in wanted if hashes["same_name"](name) not in pins} == UNPINNED.keys()
    assert re.findall(r"^- `(\w+)` ", PAGE.partition("\n## With hashes")[2], re.MULTILINE) == list(UNPINNED)
    assert all(f"- `{name}` {reason}" in PAGE for name, reason in UNPINNED.items())
    unpinned: dict[str, tuple[str, ...]] = runpy.run_path(str(ROOT / ".ci/extras.py"))["UNPINNED"]
    for each in unpinned["mlflow"]:
        assert f"{each} {pins[hashes['same_name'](each)]}" in PAGE, f"does mlflow still refuse this {each}?"
    assert hashes["differences"]() == [], "run python .ci/hashes.py"


def test_every_extra_has_a_use_and_a_row():
    tree = ast.parse((ROOT / ".ci/extra_uses.py").read_text())
    assert runpy.run_path(str(ROOT / ".ci/extras.py"))["_names"]() == [
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in EXTRAS
    ]
    measured = re.findall(r"^\| (\w+) \| \d+ \| [\d,]+ MB \| installed and used", PAGE, re.MULTILINE)
    missing = re.search(r"^Not run yet: (.*)\.$", PAGE, re.MULTILINE)
    assert sorted([*measured, *(missing[1].split(", ") if missing else [])]) == sorted(
        ["core", *(EXTRAS.keys() - {"test"})]
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_extra_installs_and_works_in_a_bare_environment():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / ".ci/extras.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    used = re.findall(r"^\| (\w+) \| \d+ \| [\d,]+ MB \| installed and used", done.stdout, re.MULTILINE)
    assert sorted(used) == sorted(["core", *(EXTRAS.keys() - {"test"})])
