"""Run the notebooks of this folder from end to end, and store what they print and draw:

    python examples/notebooks/run.py                     all of them; files are left as they are
    python examples/notebooks/run.py --store first_head  this one, and write its outputs into the file

Needs `pip install '.[notebooks]'`. A cell that fails ends it with that cell and its error.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LIMIT = 900  # seconds for a cell, on a machine that has other work
OF_A_MACHINE = re.compile(r"(?<![\w.:/])/(?!/)[\w.+-]+/[\w./+-]+")
"""An absolute path."""


def run(name: str) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a new kernel. Raises nbclient's CellExecutionError where a cell fails.

    The kernel is this Python, and `partial-fc` in a cell the command beside it.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    beside = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    client = NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", record_timing=False, resources={"metadata": {"path": FOLDER}}
    )
    client.execute(env={**os.environ, **beside})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = without_progress(cell.outputs)
    return notebook


def without_progress(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without what went to stderr, progress bars mostly; what a cell printed in pieces is one piece."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.get("name") == "stdout" == kept[-1].get("name"):
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the outputs say in words."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        "".join(text)
        for output in outputs
        for text in (output.get("text"), output.get("data", {}).get("text/plain"))
        if text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--store", action="store_true", help="write the outputs into the files")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"there is no notebook {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in options.names:
        begin = time.monotonic()
        notebook = run(name)
        print(f"{name}: all cells ran in {time.monotonic() - begin:.0f} s")
        if options.store:
            if paths := [path for text in texts(notebook) for path in OF_A_MACHINE.findall(text)]:
                sys.exit(f"the outputs of {name} have paths of this machine, and were not stored: {', '.join(paths)}")
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
