"""The examples of the engines run on two processes, have at most 60 lines, and save what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import succeed

ROOT = Path(__file__).parents[2]
EXAMPLES = ("ddp_inside.py", "fsdp2.py", "accelerate_loop.py", "transformers_trainer.py", "lightning_module.py")
SLOW = ("transformers_trainer.py", "lightning_module.py")
SAVED = {
    "fsdp2.py": ["manifest.json"],
    "accelerate_loop.py": ["state/model.safetensors", "state/partial_fc/manifest.json", "logs"],
    "transformers_trainer.py": ["checkpoint-12/model.safetensors", "checkpoint-12/partial_fc/manifest.json"],
    "lightning_module.py": ["last.ckpt", "last.ckpt.heads/manifest.json"],
}


def run(example: str, *arguments: str) -> str:
    return succeed(f"examples/{example}", *arguments, timeout=170, HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(example):
    lines = (ROOT / "examples" / example).read_text().splitlines()
    assert len(lines) <= 60
    assert f"examples/{example}" in lines[0]


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXAMPLES]
)
def test_an_example_runs(example, tmp_path):
    arguments = [] if example == "ddp_inside.py" else [str(tmp_path / "run")]
    out = run(example, *arguments, "3", "100")
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\d+\.\d+)", out)]
    if example not in ("transformers_trainer.py", "lightning_module.py"):  # which report in their own way
        assert len(losses) == 3 and losses[2] < losses[0], out
    for name in SAVED.get(example, ()):
        assert (tmp_path / "run" / name).exists(), name
