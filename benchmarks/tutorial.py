"""The commands of docs/tutorial.md as they stand there, in a copy of the project, and how long each section takes.

    python benchmarks/tutorial.py                 in a new virtual environment, with what pip finds
    python benchmarks/tutorial.py --here          in this environment: section 1, and what installs, is left out

sections of the page ── bash, one after the other ──>  seconds of each; the service is asked for an image, then stopped
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
PICTURE, NAME = "sample/visitors/U+4E11/7.png", "U+4E11"  # what section 7 drops on the page


def sections(text: str) -> dict[str, str]:
    """Title -> the commands of its bash blocks."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = {part.split("\n", 1)[0]: "".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL)) for part in parts}
    return {title: commands for title, commands in found.items() if commands}


def copy_project(folder: Path) -> None:
    """Copy the files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run(commands: str, folder: Path, environment: dict[str, str]) -> None:
    script = f"set -e\n[ -e .venv ] && source .venv/bin/activate\n{commands}"
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)


def serve(commands: str, folder: Path, environment: dict[str, str]) -> None:
    """Start the service of the commands, ask it for PICTURE as the page does, and stop it."""
    script = f"[ -e .venv ] && source .venv/bin/activate\nexec {commands.strip()} --port 0"
    service = subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert service.stdout is not None
        lines = []
        for line in service.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise SystemExit(f"the service did not start: {''.join(lines)}")
        image = (folder / PICTURE).read_bytes()
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n--x--\r\n"
        request = urllib.request.Request(
            f"{found[0]}api/search", body, {"Content-Type": "multipart/form-data; boundary=x"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        print(f"the service answers {answer['answer']}, cosine {answer['matches'][0]['cosine']:.3f}")
        assert answer["answer"] == NAME, answer
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use this environment")
    options = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        if options.here:
            # the command of this environment may belong to another copy of the project
            own = folder / "bin"
            own.mkdir()
            (own / "partial-fc").write_text(f'#!/bin/sh\nexec {sys.executable} -m partial_fc "$@"\n')
            (own / "partial-fc").chmod(0o755)
            path = f"{own}:{Path(sys.executable).parent}:{environment['PATH']}"
            environment |= {"PATH": path, "PYTHONPATH": str(folder)}
        for title, commands in sections(PAGE.read_text(encoding="utf-8")).items():
            if options.here:
                commands = "\n".join(
                    line for line in commands.splitlines() if not re.match(r"pip |python3 |source ", line)
                )
            if not commands.strip():
                continue
            print(f"== {title}", flush=True)
            start = time.monotonic()
            (serve if "partial-fc serve" in commands else run)(commands, folder, environment)
            seconds[title] = time.monotonic() - start
    print("\n| section | seconds |\n|---|---|")
    for title, taken in seconds.items():
        print(f"| {title} | {taken:.0f} |")
    print(f"| all | {sum(seconds.values()):.0f} |")


if __name__ == "__main__":
    main()
