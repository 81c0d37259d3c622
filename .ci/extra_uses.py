"""The smallest use of an extra, in an environment that has it: `python -I .ci/extra_uses.py EXTRA`, in a new folder.

.ci/extras.py makes the environments. What takes a trained run finds one in `run`, made by the use of `train`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from partial_fc import ArcFace, PartialFC, RowOptimizer

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str) -> str:
    """What `partial-fc` prints."""
    program = str(Path(sys.executable).with_name("partial-fc"))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def step(optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: object) -> PartialFC:
    """A head after one step, in which its loss fell."""
    torch.manual_seed(0)
    head = PartialFC(16, 200, ArcFace(scale=16.0), sample_rate=0.5, **options)  # type: ignore[arg-type]
    head_optimizer = RowOptimizer(optimizer, head, lr=0.1)
    embeddings, labels = torch.randn(32, 16), torch.randint(0, 200, (32,))
    losses = []
    for _ in range(2):
        loss = head(embeddings, labels)
        loss.backward()
        head_optimizer.step()
        head_optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0], losses
    return head


def core() -> None:
    step()


def trained(folder: str, *options: str) -> None:
    settings = ["--data.identities", "20", "--train.epochs", "1", "--train.batch_size", "50"]
    small = ["--backbone.embedding_size", "16", "--output.folder", folder]
    command("train", str(ROOT / "configs/quickstart.yaml"), *settings, *small, *options)


def train() -> None:
    trained("run")
    assert Path("run/report.html").is_file() and Path("run/plots/roc.png").is_file()
    assert list(Path("run/tensorboard").rglob("events.out.tfevents.*"))


def data() -> None:
    command("data", "sample", "sample", "--identities", "2")
    command("data", "convert", "sample/training", "converted", "--format", "parquet")
    assert re.search(r"^identities +2$", command("data", "inspect", "converted"), flags=re.MULTILINE)


def export() -> None:
    command("export-backbone", "run", "--output", "exported", "--formats", "safetensors", "onnx")
    assert {"backbone.safetensors", "backbone.onnx"} <= {path.name for path in Path("exported").iterdir()}


def gallery() -> None:
    command("data", "sample", "sample", "--identities", "2")
    command("embed", "run", "--data", "sample/people", "--output", "embeddings")
    assert list(Path("embeddings").glob("*.parquet"))
    command("gallery", "build", "people", "--embeddings", "embeddings")
    assert "U+4E11" in command("gallery", "search", "people", "--run", "run", "sample/people/U+4E11/0.png")


def serve() -> None:
    command("data", "sample", "sample", "--identities", "2")
    command("gallery", "build", "people", "--run", "run", "--data", "sample/people")
    program = str(Path(sys.executable).with_name("partial-fc"))
    with subprocess.Popen(
        [program, "serve", "run", "--gallery", "people", "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            assert service.stdout is not None
            address = next(found[0] for line in service.stdout if (found := re.search(r"http://\S+", line)))
            image = Path("sample/people/U+4E11/0.png").read_bytes()
            body = (
                b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n--x--\r\n"
            )
            kind = {"Content-Type": "multipart/form-data; boundary=x"}
            with urllib.request.urlopen(
                urllib.request.Request(f"{address}api/search", body, kind), timeout=300
            ) as answer:
                assert json.load(answer)["matches"]
        finally:
            service.send_signal(signal.SIGINT)


def wandb() -> None:
    os.environ["WANDB_MODE"] = "offline"
    trained("tracked", "--output.trackers", "[wandb]")
    assert list(Path("tracked").glob("wandb/*/*.wandb"))


def mlflow() -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///runs.db"
    trained("tracked", "--output.trackers", "[mlflow]", "--output.project", "uses")
    from mlflow import MlflowClient

    link = json.loads(Path("tracked/trackers.json").read_text())["mlflow"]["link"]
    assert "loss" in MlflowClient("sqlite:///runs.db").get_run(link["run_id"]).data.metrics


def mpi() -> None:
    """Without an MPI library, which is the machine's, it says so; with one it starts a process group."""
    from partial_fc.engines import mpi

    said = ""
    try:
        mpi.init_process_group("gloo")
    except RuntimeError as error:
        said = str(error)
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == 1
        torch.distributed.destroy_process_group()
    else:
        assert mpi.MISSING in said, said


def ray() -> None:
    """Two ranks on a cluster of this machine alone."""
    options = ["--workers", "2", "--cpus", "0.5", "--restarts", "0", "--storage", str(Path("ray").absolute())]
    ranks = [sys.executable, "-m", "partial_fc.engines.ray", *options, "--address", "local", __file__, "core"]
    done = subprocess.run(ranks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def examples() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from place_names import hashes, read_places

    places = read_places()
    assert len(places) > 10_000 and hashes(places[0]).shape[0] == len(places[0])


def glyphs() -> None:
    import matplotlib

    from partial_fc.training.data.fonts.draw_face import draw_face
    from partial_fc.training.data.fonts.font_files import find_faces

    (face,) = find_faces([Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"], ((0x41, 0x5A),)).faces
    assert len(draw_face(face, None, ((0x41, 0x5A),), 32).images) == 26


def optimizers() -> None:
    from partial_fc.training.more_optimizers import Yogi

    step(Yogi)


def kernels() -> None:
    import triton

    from partial_fc.kernels.choice import triton_problem

    assert not triton_problem() and triton.__version__
    step(kernels="auto")


def fuzz() -> None:
    """Ends the process, with 0 unless an input does harm."""
    import atheris

    from partial_fc.weights.safetensors_file import read_header

    read, path = atheris.instrument_func(read_header), Path("rows.safetensors")

    def try_one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(OSError, ValueError):
            read(path)

    atheris.Setup([sys.argv[0], "-runs=200"], try_one)
    atheris.Fuzz()


def faiss() -> None:
    step(hard_negatives=2, hard_negatives_search="faiss")


def models() -> None:
    """Prints that timm was left out where torchvision, which it needs, is not built for this torch."""
    from importlib.metadata import version

    from partial_fc.training.backbones import build_backbone

    names = ["hf:mobilenet_v1", "timm:test_resnet"]
    if "+" in torch.__version__ and "+" not in version("torchvision"):
        print(f"without timm: torchvision {version('torchvision')} is of another build than torch {torch.__version__}")
        names.pop()
    for name in names:
        backbone = build_backbone(name, image_shape=(3, 64, 64), embedding_size=16).eval()
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 16)


def engines() -> None:
    from accelerate import Accelerator

    from partial_fc.engines import accelerate, lightning, transformers

    assert lightning.HeadStrategy and transformers.HeadTrainer and accelerate.__name__
    step()
    Accelerator(cpu=True).prepare(torch.nn.Linear(2, 2))


def deepspeed() -> None:
    from partial_fc.engines.deepspeed import DeepSpeedHead, import_deepspeed

    assert import_deepspeed().__version__ and DeepSpeedHead


def docs() -> None:
    site = ["--config-file", str(ROOT / "docs/site/mkdocs.yml"), "--site-dir", str(Path("site").absolute())]
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", *site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path("site/index.html").is_file()


def notebooks() -> None:
    import nbformat
    from nbclient import NotebookClient

    cell = nbformat.v4.new_code_cell("import matplotlib.pyplot, partial_fc; print(partial_fc.__version__)")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    import partial_fc

    assert notebook.cells[0].outputs[0]["text"].strip() == partial_fc.__version__


USES: dict[str, Callable[[], None]] = {
    use.__name__: use
    for use in (
        train,
        data,
        export,
        gallery,
        serve,
        wandb,
        mlflow,
        mpi,
        ray,
        examples,
        glyphs,
        optimizers,
        kernels,
        fuzz,
        faiss,
        models,
        engines,
        deepspeed,
        docs,
        notebooks,
    )
}
"""Extra of pyproject.toml -> its use; all but `test`, which .ci/run uses."""


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    {"core": core, **USES}[sys.argv[1]]()
