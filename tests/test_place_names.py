"""The example of text: short, run by two processes, and it learns what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/place_names.py"


@pytest.mark.slow
def test_names_of_places_are_learned():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 120
    assert "examples/place_names.py" in lines[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLE)]
    command += ["--classes", "1500", "--held_places", "200", "--batch_size", "256"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses[-1] < 0.8 * losses[0], done.stdout
    before, after = (float(rate) for rate in re.findall(r"EER +(\d+\.\d+) %", done.stdout))
    assert after < before - 3, done.stdout
    share, classes = re.search(r"(\d+\.\d) % are nearest to their own place of ([\d,]+) classes", done.stdout).groups()
    assert classes == "1,500"
    assert float(share) > 5  # by chance 0.07
