"""The text example is short, runs on two processes, and learns what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import succeed

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/place_names.py"


@pytest.mark.slow
def test_names_of_places_are_learned():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 120
    assert "examples/place_names.py" in lines[0]
    out = succeed(str(EXAMPLE), "--classes", "1500", "--held_places", "200", "--batch_size", "256", timeout=170)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out)]
    assert losses[-1] < 0.8 * losses[0], out
    before, after = (float(rate) for rate in re.findall(r"EER +(\d+\.\d+) %", out))
    assert after < before - 3, out
    share, classes = re.search(r"(\d+\.\d) % are nearest to their own place of ([\d,]+) classes", out).groups()
    assert classes == "1,500"
    assert float(share) > 5  # by chance 0.07
