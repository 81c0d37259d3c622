"""Use an installed partial_fc in an environment that has torch alone: `python -I .ci/smoke.py`, from any other folder.

Imports every module of the core, trains a head in one process, saves and loads a checkpoint. Checks metadata, package
data, and the message of the command line when the packages of the application are missing.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata, resources
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns that NumPy is not installed
    import torch

warnings.simplefilter("error")

import partial_fc  # noqa: E402
from partial_fc import (  # noqa: E402
    ArcFace,
    PartialFC,
    RowOptimizer,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)

APPLICATION = ("partial_fc.__main__", "partial_fc.training", "partial_fc.engines", "partial_fc.kernels.device")
"""What may need more than torch."""


def check_metadata() -> None:
    found = metadata.metadata("partial_fc")
    assert metadata.version("partial_fc") == partial_fc.__version__
    assert found["Name"] == "partial_fc" and found["Author"] == "the partial_fc authors" and found["Summary"]
    assert found["License-Expression"] == "Apache-2.0" and found["Requires-Python"] == ">=3.10"
    assert "metric learning" in found["Keywords"] and "arcface" in found["Keywords"]
    assert "Typing :: Typed" in found.get_all("Classifier")
    required = [line for line in metadata.requires("partial_fc") or [] if "extra ==" not in line]
    assert required == ["torch>=2.6"], required
    distribution = metadata.distribution("partial_fc")
    licenses = {path.name: path for path in distribution.files or [] if ".dist-info/licenses/" in str(path)}
    assert "Apache License" in licenses["LICENSE"].read_text() and "ATTRIBUTION.md" in licenses


def check_core() -> None:
    """Every module of the core can be imported, and every public name exists."""
    names = [name for _, name, _ in pkgutil.walk_packages(partial_fc.__path__, "partial_fc.", onerror=lambda _: None)]
    core = [name for name in names if not name.startswith(APPLICATION)]
    assert len(core) > 20, core
    for name in core:
        importlib.import_module(name)
    for name in partial_fc.__all__:
        assert getattr(partial_fc, name) is not None


def check_package_data() -> None:
    files = resources.files("partial_fc")
    for path in (
        "py.typed",
        "training/report/audit.html.j2",
        "training/report/report.html.j2",
        "training/report/compare.html.j2",
        "training/serve/page/index.html",
        "training/serve/page/page.js",
    ):
        assert files.joinpath(path).is_file(), path
    assert len(files.joinpath("training/assets/glyphs1300.npz.xz").read_bytes()) > 1_000_000
    assert files.joinpath("training/assets/ATTRIBUTION.md").is_file()


def check_training(folder: str) -> None:
    """Twenty steps of a sampled ArcFace lower the loss; a head that loads its checkpoint has the same next loss."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(64, 16), torch.arange(64) % 50

    def build() -> tuple[PartialFC, RowOptimizer]:
        head = PartialFC(16, 50, ArcFace(scale=16.0), sample_rate=0.5)
        return head, RowOptimizer(torch.optim.SGD, head, lr=0.5, momentum=0.9)

    def step(head: PartialFC, optimizer: RowOptimizer) -> float:
        loss = head(embeddings, labels)
        loss.backward()
        clip_grad_norm_([], head, max_norm=5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    head, optimizer = build()
    losses = [step(head, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0], losses
    save_checkpoint(folder, head=head, optimizer=optimizer)

    other, its_optimizer = build()
    load_checkpoint(folder, head=other, optimizer=its_optimizer)
    assert torch.equal(other.weight, head.weight)
    assert step(other, its_optimizer) == step(head, optimizer)


def check_command() -> None:
    """Without the packages of the application, the command says what to install."""
    command = Path(sys.executable).with_name("partial-fc")
    for call in ([str(command), "--help"], [sys.executable, "-m", "partial_fc", "--help"]):
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and not done.stdout, done
        assert "pip install 'partial_fc[train]'" in done.stderr and "Traceback" not in done.stderr, done.stderr


if __name__ == "__main__":
    assert "site-packages" in partial_fc.__file__, f"this tests an installed package, not {partial_fc.__file__}"
    check_metadata()
    check_core()
    check_package_data()
    with tempfile.TemporaryDirectory() as folder:
        check_training(folder)
    check_command()
    print(f"partial_fc {partial_fc.__version__} works with torch {torch.__version__} alone")
