"""The commands of docs/tutorial.md run as they stand there, and lead to the right name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_leads_to_a_search():
    command = [sys.executable, str(ROOT / "benchmarks" / "tutorial.py"), "--here"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "the service answers U+4E11" in result.stdout
    for section in ("2. Images", "3. Train", "5. Embed", "6. Enrol in a gallery", "8. Hand the model on"):
        assert f"| {section} |" in result.stdout
