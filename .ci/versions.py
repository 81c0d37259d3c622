"""Run tests in new environments with the lowest, the newest and other versions that pyproject.toml allows.

    python .ci/versions.py                               all of ENVIRONMENTS, one after the other
    python .ci/versions.py lowest newest                 some of them, by name
    python .ci/versions.py "torch==2.9.1 python==3.12"   others, with the tools of constraints.txt; an argument for each
    python .ci/versions.py --quick lowest torch==2.14.1  a small selection: what .ci/run runs
    python .ci/versions.py --tests tests/optim -- lowest these tests

Prints a table in Markdown (docs/versions.md holds it) and exits with 1 if a test failed. What cannot be installed is
"skipped", with the reason: the index does not serve it, or this machine has no such Python. Environments are made in a
temporary folder and removed after use; each needs up to 8 GB and, where torch is not in the cache of pip, a download of
3 GB. Python 3.10 or newer runs it; interpreters are looked for on the path and in pyenv.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

CORE = tuple(f"tests/{name}" for name in ("core", "optim", "checkpoint", "classes", "loop", "nonfinite", "distributed"))
QUICK = (
    *(f"tests/core/test_{name}.py" for name in ("versions", "modes", "wiring", "head")),
    "tests/optim",
    "tests/checkpoint/test_checkpoint.py",
)
TOOLS = ("hypothesis", "numpy", "pytest", "pytest-timeout")  # what the core's tests need beside torch
TIMEOUT = 40 * 60  # seconds for the tests of an environment
INSTALLATION = 10 * 60  # seconds for the packages, then it is skipped


@dataclass(frozen=True)
class Environment:
    """python: "lowest", "newest" or a version. requirements: as pip takes them, or "lowest NAME" for the lower bound of
    NAME in pyproject.toml, "lowest [EXTRA]" for those of an extra."""

    name: str
    python: str = "newest"
    requirements: tuple[str, ...] = ("torch", *TOOLS)
    tests: tuple[str, ...] = CORE


ENVIRONMENTS = (
    Environment("lowest", "lowest", tuple(f"lowest {name}" for name in ("torch", *TOOLS))),
    Environment("torch==2.8.0", "3.11", ("torch==2.8.0", *TOOLS), QUICK),
    Environment("torch==2.9.1", "3.12", ("torch==2.9.1", *TOOLS), QUICK),
    Environment("torch==2.10.0", "3.11", ("torch==2.10.0", *TOOLS), QUICK),
    Environment("torch==2.11.0", "3.12", ("torch==2.11.0", *TOOLS)),
    Environment("torch==2.12.1", "3.13", ("torch==2.12.1", *TOOLS), QUICK),
    Environment("newest"),
)


def lowest(requirement: str) -> list[str]:
    """["torch==2.6"] of "lowest torch"; of "lowest [train]" one for each package of the extra, and of those in it."""
    text = (ROOT / "pyproject.toml").read_text()
    bound = re.compile(r'"([\w.-]+)(\[\w+\])?>=([\d.]+)"')
    name = requirement.removeprefix("lowest ")
    if not name.startswith("["):
        return [f"{name}=={version}" for package, _, version in bound.findall(text) if package == name][:1]
    (block,) = re.findall(rf"^{name[1:-1]} = \[(.*?)\]\n", text, flags=re.MULTILINE | re.DOTALL)
    found = [f"{package}{more}=={version}" for package, more, version in bound.findall(block)]
    for within in re.findall(r'"partial_fc\[([\w,]+)\]"', block):
        found += [each for extra in within.split(",") for each in lowest(f"lowest [{extra}]")]
    return found


def interpreters() -> dict[str, str]:
    """Path of each Python of this machine, by its version."""
    found: dict[str, str] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
        for path in filter(None, candidates):
            code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                found.setdefault(version, path)
    return found or {"{}.{}".format(*sys.version_info): sys.executable}


def pinned(name: str) -> str:
    """The version in constraints.txt."""
    (version,) = re.findall(rf"^{name}==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return str(version)


def of_argument(text: str) -> Environment:
    for each in ENVIRONMENTS:
        if text == each.name:
            return each
    wanted = dict(re.fullmatch(r"([\w.-]+)==([\w.+]+)", each).groups() for each in text.split())  # type: ignore[union-attr,misc]
    python = wanted.pop("python", "newest")
    wanted.setdefault("torch", pinned("torch"))
    tools = [f"{name}=={pinned(name)}" for name in TOOLS if name not in wanted]
    return Environment(text, python, (*(f"{name}=={version}" for name, version in wanted.items()), *tools))


@dataclass
class Result:
    versions: str
    outcome: str
    failed: bool = False


class Skipped(Exception):
    """Why an environment cannot be had."""


def why(said: str) -> str:
    """The line of pip that tells most."""
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    told = [line for line in errors if not line.startswith("Ignored the following versions")]
    return re.sub(r" \(from versions: .*", "", (told or errors or ["pip does not say why"])[0])


def build(environment: Environment, folder: Path) -> Path:
    """Make the environment and return its Python."""
    pythons = interpreters()
    version = {"newest": max(pythons, key=PYTHONS.index), "lowest": min(pythons, key=PYTHONS.index)}.get(
        environment.python, environment.python
    )
    if version not in pythons:
        raise Skipped(f"this machine has no Python {version}")
    subprocess.run([pythons[version], "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = [
        each
        for requirement in environment.requirements
        for each in (lowest(requirement) if requirement.startswith("lowest ") else [requirement])
    ]
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile", *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALLATION)
    except subprocess.TimeoutExpired:
        raise Skipped(f"not installed after {INSTALLATION // 60} minutes: {' '.join(wanted)}") from None
    if done.returncode:
        raise Skipped(f"cannot be installed: {why(done.stderr)}")
    return python


def installed(python: Path, names: list[str]) -> str:
    code = (
        "import sys, importlib.metadata as m\n"
        "print(*[f'{n} {m.version(n)}' for n in sys.argv[1:]], 'Python %d.%d.%d' % sys.version_info[:3], sep=', ')"
    )
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def run(environment: Environment, tests: tuple[str, ...], folder: Path) -> Result:
    begin = time.monotonic()
    try:
        python = build(environment, folder)
    except Skipped as reason:
        print(f"== {environment.name}: skipped: {reason}", flush=True)
        return Result(environment.name, f"skipped: {reason}")
    made = time.monotonic() - begin
    names = [re.sub(r"^lowest |\[.*|[=<>].*", "", each) for each in environment.requirements]
    versions = installed(python, [name for name in names if name not in ("", *TOOLS) or name == "numpy"])
    print(f"== {versions} (installed in {made:.0f} s)", flush=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{variables['PATH']}"
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "--tb=short", *tests]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return Result(versions, f"no result after {TIMEOUT // 60} minutes", True)
    lines = [line for line in done.stdout.splitlines() if line]
    last = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))
    if done.returncode:
        print(done.stdout, flush=True)
    outcome = f"{last}; {time.monotonic() - begin:.0f} s"
    print(f"   {outcome}", flush=True)
    return Result(versions, outcome, done.returncode != 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=[each.name for each in ENVIRONMENTS])
    parser.add_argument("--quick", action="store_true", help="a small selection of the tests")
    parser.add_argument("--tests", nargs="*", help="these tests")
    parser.add_argument("--folder", type=Path, help="where environments are made, and kept")
    arguments = parser.parse_args()
    results = []
    for each in map(of_argument, arguments.environments):
        tests = tuple(arguments.tests or (QUICK if arguments.quick else each.tests))
        with tempfile.TemporaryDirectory(prefix="versions-") as temporary:
            results.append(run(each, tests, (arguments.folder or Path(temporary)) / re.sub(r"\W+", "-", each.name)))
    print("\n| versions | result |\n|---|---|")
    for result in results:
        print(f"| {result.versions} | {result.outcome} |")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
