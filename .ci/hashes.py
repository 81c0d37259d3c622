"""Write constraints-hashes.txt: the versions of constraints.txt with the hash of the file that pip takes for each.

    python .ci/hashes.py           asks the package index and writes the file
    python .ci/hashes.py --new     asks only for versions that have no hash yet, and keeps the other lines
    python .ci/hashes.py --check   only compares the two files' versions; asks nobody

pip itself says which files those are (`pip install --dry-run --report`). It takes the files for the Python and the
machine that it runs on, so run it with the Python that constraints.txt is tested with. Of torch, other builds have
other hashes: one that is installed already is kept.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS, HASHES = ROOT / "constraints.txt", ROOT / "constraints-hashes.txt"
HEAD = """\
# The versions of constraints.txt with the SHA-256 of their files, for Python {python} on {machine}.
# Made by `python .ci/hashes.py`; docs/dependencies.md says how it is used.
"""
LINE = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$")


def same_name(name: str) -> str:
    """A package's name in the one spelling that indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt."""
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    return {same_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def hashed() -> dict[str, tuple[str, str]]:
    """Name -> (version, hash) of constraints-hashes.txt. Exits with a line that is no version with a hash."""
    found = {}
    for line in HASHES.read_text().splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            sys.exit(f"{HASHES.name} has a line that is no version with a hash: {line}")
        found[same_name(match[1])] = match[2], match[3]
    return found


def differences() -> list[str]:
    """What the two files do not agree on, in words."""
    wanted, found = pins(), {name: version for name, (version, _) in hashed().items()}
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return [f"{name}: {wanted.get(name)} in {PINS.name}, {found.get(name)} in {HASHES.name}" for name in names]


def ask(versions: dict[str, str]) -> dict[str, str]:
    """Name -> SHA-256 of the file that pip would install for each of these versions."""
    if not versions:
        return {}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--quiet", "--report", "-"]
    command += [f"{name}=={version}" for name, version in versions.items()]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    found = {}
    for each in report["install"]:
        found[same_name(each["metadata"]["name"])] = each["download_info"]["archive_info"]["hashes"]["sha256"]
    return found


def write(keep: bool) -> None:
    """Write the file; with `keep`, versions that it has already keep their hashes."""
    from sysconfig import get_platform

    kept = hashed() if keep else {}
    wanted = pins()
    sums = {name: sha for name, (version, sha) in kept.items() if wanted.get(name) == version}
    sums |= ask({name: version for name, version in wanted.items() if name not in sums})
    head = HEAD.format(python="{}.{}".format(*sys.version_info), machine=get_platform())
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    text = [f"{line} --hash=sha256:{sums[same_name(line.partition('==')[0])]}" for line in lines]
    HASHES.write_text(head + "\n".join(text) + "\n")
    print(f"{HASHES.name}: {len(text)} files")


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        write(keep=sys.argv[1:] == ["--new"])
    if problems := differences():
        sys.exit("\n".join(problems))
