"""Install each extra in a new environment with torch alone, and use it: `python .ci/extras.py [EXTRA ...]`.

torch ── once ──> an environment ── copied for each extra ──> wheel[EXTRA] with constraints.txt ──> .ci/extra_uses.py

Prints a table in Markdown (docs/dependencies.md holds it) and exits with 1 if an extra does not install or work. Needs
the package registry, and up to 3 GB for an environment in a temporary folder, which is removed after its use.
`--environments DIR` keeps what was made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USES = ROOT / ".ci" / "extra_uses.py"
LIMIT = 60 * 60  # seconds for one command
NEED_A_RUN = ("export", "gallery", "serve")
UNPINNED = {"mlflow": ("importlib_metadata", "pyarrow")}  # it refuses the versions that the others are tested with
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
    "OMP_NUM_THREADS": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


class Failed(Exception):
    """A command failed; what it printed last."""


def give(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder; return what it printed. Raises Failed."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {LIMIT} s") from None
    if done.returncode:
        raise Failed((done.stdout + done.stderr)[-3000:])
    return done.stdout


def pip(environment: Path, *arguments: str | Path) -> str:
    python = environment / "bin" / "python"
    return give(python, "-m", "pip", *arguments, folder=environment)


def packages(environment: Path) -> set[str]:
    """Names and versions of what is installed: NAME-VERSION."""
    return {path.stem for path in environment.glob("lib/python3*/site-packages/*.dist-info")}


def size(environment: Path) -> int:
    """Bytes of the environment's files."""
    return sum(path.lstat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())


def copied(base: Path, environment: Path) -> Path:
    """A copy by links; pip replaces files and does not write into them."""
    shutil.copytree(base, environment, symlinks=True, copy_function=os.link)
    return environment


def install_and_use(extra: str, wheel: Path, base: Path, work: Path) -> tuple[int, int, str]:
    """Return how many packages and bytes the extra adds to torch, and what the use has said. Raises Failed."""
    environment = copied(base, work / f"environment-{extra}")
    wanted = f"{wheel}[{extra}]" if extra != "core" else str(wheel)
    constraints = work / f"constraints-{extra}.txt"
    pins = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    constraints.write_text("".join(pin for pin in pins if pin.partition("==")[0] not in UNPINNED.get(extra, ())))
    pip(environment, "install", "--no-compile", "--quiet", "--constraint", constraints, wanted)
    added = packages(environment) - packages(base)
    grown = size(environment) - size(base)
    pip(environment, "check")
    folder = work / f"use-{extra}"
    folder.mkdir()
    if extra in NEED_A_RUN:
        (folder / "run").symlink_to(work / "use-train" / "run")
    said = give(environment / "bin" / "python", "-I", USES, extra, folder=folder).strip()
    return len([name for name in added if not name.startswith("partial_fc-")]), grown, said


def main() -> int:
    sys.path.insert(0, str(USES.parent))
    names = ["core", *_names()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", default=names, metavar="EXTRA", help=f"of: {', '.join(names)}")
    parser.add_argument("--environments", type=Path, help="make them in this new folder, and keep them")
    options = parser.parse_args()
    if unknown := sorted(set(options.extras) - set(names)):
        parser.error(f"there is no extra {', '.join(unknown)}")
    extras = list(options.extras)
    if set(extras) & set(NEED_A_RUN):
        extras = ["train", *(extra for extra in extras if extra != "train")]
    failed = False
    rows = []
    with tempfile.TemporaryDirectory(prefix="extras-") as temporary:
        work = options.environments or Path(temporary)
        work.mkdir(exist_ok=True)
        base = work / "environment"
        give(sys.executable, "-m", "venv", base, folder=work)
        pip(base, "install", "--no-compile", "--quiet", "--constraint", ROOT / "constraints.txt", "torch")
        pip(base, "wheel", "--quiet", "--no-deps", "--wheel-dir", work, ROOT)
        (wheel,) = work.glob("partial_fc-*.whl")
        for extra in extras:
            begin = time.monotonic()
            try:
                count, grown, said = install_and_use(extra, wheel, base, work)
                rows.append(f"| {extra} | {count} | {grown / 1e6:,.0f} MB | installed and used{said and ', ' + said} |")
            except Failed as error:
                failed = True
                print(f"== {extra} failed:\n{error}", flush=True)
                rows.append(f"| {extra} | | | **failed** |")
            print(f"== {rows[-1]} ({time.monotonic() - begin:.0f} s)", flush=True)
            if options.environments is None:
                shutil.rmtree(work / f"environment-{extra}", ignore_errors=True)
    print("\n| extra | packages beside torch's | size | result |\n|---|---|---|---|")
    print("\n".join(rows))
    return int(failed)


def _names() -> list[str]:
    """The extras that have a use, by the source of extra_uses.py: it imports what only their environments have."""
    import ast

    for node in ast.parse(USES.read_text()).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "USES":
            (generator,) = node.value.generators  # type: ignore[union-attr]
            return [name.id for name in generator.iter.elts]  # type: ignore[attr-defined]
    raise AssertionError("extra_uses.py has no USES")


if __name__ == "__main__":
    sys.exit(main())
