"""What is to be known of the head on a GPU, by one command: is it right, when does it wait, how fast is it, what does it
take.

    PYTHONPATH=. python benchmarks/gpu.py [--parts proof waits ...] [--minutes 5] [--quick] [--tf32] [--out runs/gpu]

    proof     training steps beside dense float64: all margins and options, PASS or FAIL       gpu_proof.py
    waits     how often a step waits for the device: once at most, PASS or FAIL                gpu_waits.py
    two       two ranks on the one device, by gloo, beside dense float64, PASS or FAIL         gpu_two.py
    speed     a step over the three matrix products that it needs; memory over the plan        gpu_speed.py
    peers     the same work by others, where they are installed                                gpu_peers.py
    profile   kernels and launches of the step that was slowest over its floor                 gpu_profile.py
    kernels   partial_fc's own kernels: right? how fast, beside plain PyTorch and others?      gpu_kernels.py

`kernels` takes the five minutes for itself: it runs where `--parts` names it, alone best.
It needs torch and one GPU, and neither the network nor an installed package of this project. Parts run in this order,
in the given minutes together; what these did not allow is named at the end. Every outcome is printed at once and
written to OUT/results.json, every part to OUT/table.md and OUT/plot.svg. The exit status is 1 if anything FAILs. A case
that ends its process, spoils the device for it or does not end is noted, and a new process goes on (gpu_watch.py).

float32 products run in float32, in TF32 with --tf32 (then only `speed`, `peers` and `profile` mean anything: TF32 is
coarser than what `proof` allows). `--quick` shows that all of it runs, at sizes that say nothing; so does
`--device cpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()  # torch and the device take their time before the first part; one clock for all processes
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import gpu_report  # noqa: E402
import gpu_watch  # noqa: E402

# the function, and by which share of the minutes each part ends; time that one leaves is the next one's
PARTS = {
    "proof": ("gpu_proof.proof", 0.25),
    "waits": ("gpu_waits.waits", 0.3),
    "two": ("gpu_two.two", 0.45),
    "speed": ("gpu_speed.speed", 0.8),
    "peers": ("gpu_peers.compare", 0.93),
    "profile": ("gpu_profile.profile", 0.98),
    "kernels": ("gpu_kernels.kernels", 0.98),
}
USUAL = [name for name in PARTS if name != "kernels"]


def about(device: Any, tf32: bool) -> dict[str, Any]:
    import torch

    commit = ""
    with contextlib.suppress(OSError):  # there may be no git
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "float32 products": "TF32" if tf32 else "float32",
    }
    if device.type != "cuda":
        return {"device": "cpu", **found}
    card = torch.cuda.get_device_properties(device)
    return {
        "device": f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}",
        "CUDA": torch.version.cuda,
        **found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=USUAL)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu for small sizes")
    parser.add_argument("--quick", action="store_true", help="sizes at which figures say nothing")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # of the process that watches this one
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.began is None:
        command = [sys.executable, __file__, *sys.argv[1:], "--began", repr(BEGAN)]
        return gpu_watch.watch(command, asked.out, BEGAN + 60 * asked.minutes)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    return run_cases(parser, asked)


def leave_with(parent: int) -> None:
    """Do not outlive the process that watches this one."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run_cases(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    import torch
    from gpu_run import Run

    device = torch.device(asked.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; --device cpu runs everything at small sizes")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = asked.tf32
    quick = asked.quick or device.type == "cpu"
    run = Run(device, quick, asked.minutes, asked.out, asked.tf32, about(device, asked.tf32), began=asked.began)
    run.go_on()
    if not run.rows:
        print("\n".join(f"{name}: {value}" for name, value in run.about.items()), flush=True)
    for name, (part, until) in PARTS.items():
        if name in asked.parts:
            module, function = part.split(".")
            run.run_part(name, until, lambda run, m=module, f=function: getattr(importlib.import_module(m), f)(run))
            if name in gpu_report.JUDGED:
                print(f"{name}: {gpu_report.verdicts(run.rows)[name]}", flush=True)
            text = gpu_report.table(run.rows, run.about, quick)
            (asked.out / "table.md").write_text(text)
            (asked.out / "plot.svg").write_text(gpu_report.plot(run.rows))
    (asked.out / "now.json").write_text('{"ended": true}')
    print(f"\n{text}\n{', '.join(f'{part}: {verdict}' for part, verdict in gpu_report.verdicts(run.rows).items())}")
    print(f"{asked.out / 'results.json'}, table.md, plot.svg")
    return int(any(row["verdict"] == gpu_report.FAIL for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
