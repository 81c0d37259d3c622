"""What `lint-imports` cannot check: that its contracts name every package and module, and circles of modules."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
APPLICATION = ("partial_fc.__main__", "partial_fc.training", "partial_fc.engines")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("partial_fc", include_external_packages=True, cache_dir=None)


@pytest.fixture(scope="module")
def contracts() -> dict[str, dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["id"]: contract for contract in settings["contracts"]}


def own(graph: grimp.ImportGraph) -> set[str]:
    return {name for name in graph.modules if name.split(".")[0] == "partial_fc"}


def packages(graph: grimp.ImportGraph, modules: set[str]) -> set[tuple[str, str]]:
    """(module, package outside the standard library that it imports)."""
    outside = graph.modules - own(graph) - sys.stdlib_module_names
    return {(name, each) for name in modules for each in graph.find_modules_directly_imported_by(name) & outside}


def test_the_core_imports_torch_alone(graph, contracts):
    core = {name for name in own(graph) if not name.startswith(APPLICATION)}
    lazily = {tuple(line.split(" -> ")) for line in contracts["torch"]["ignore_imports"]}
    assert {pair for pair in packages(graph, core) if pair[1] != "torch"} == lazily


def test_the_contract_of_the_core_knows_all_packages(graph, contracts):
    used = {package for _, package in packages(graph, own(graph))} - {"torch"}
    assert used <= set(contracts["torch"]["forbidden_modules"])


def test_the_contracts_of_the_core_reach_all_of_it(graph, contracts):
    core = {name for name in own(graph) if not name.startswith(APPLICATION)}
    reached = graph.find_upstream_modules("partial_fc")
    apart = {name for name in core - reached - {"partial_fc"} if not graph.find_children(name)}
    assert apart == set(contracts["torch"]["source_modules"]) - {"partial_fc"}


def test_no_module_imports_itself_by_way_of_others(graph):
    names = own(graph)
    imports = {name: graph.find_modules_directly_imported_by(name) & names for name in names}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_no_module_imports_a_private_name_of_another():
    found = []
    for path in sorted((ROOT / "partial_fc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "partial_fc":
                private = [each.name for each in node.names if re.match(r"_[^_]", each.name)]
                found += [f"{path.relative_to(ROOT)}: {node.module}.{name}" for name in private]
    assert found == []
