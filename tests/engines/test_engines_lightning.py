"""Lightning with a head inside the module, against one dense process: accumulation, clipping, saving, resuming."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from engines_common import (
    ACCUMULATION,
    IMPORTING,
    MAX_NORM,
    SGD,
    STEPS,
    Joint,
    Result,
    compare,
    compare_resumed,
    finish,
    my_part,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from partial_fc import RowOptimizer, clip_grad_norm_, save_checkpoint
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.lightning import HeadStrategy
from partial_fc.engines.same_save import Token

SAVED_AFTER = 2
pytestmark = pytest.mark.filterwarnings("ignore")


class Recogniser(pl.LightningModule):
    """An epoch is one step."""

    def __init__(self, rank: int, world: int, rate: float) -> None:
        super().__init__()
        self.place, self.rate = (rank, world), rate
        self.norms: list[Tensor] = []
        self.selected: list[Tensor] = []

    def configure_model(self) -> None:
        joint = Joint(self.rate)
        self.backbone, self.head = joint.backbone, joint.head

    def train_dataloader(self) -> Any:
        first = self.current_epoch * ACCUMULATION
        return torch.utils.data.DataLoader(
            [my_part(first + k, *self.place) for k in range(ACCUMULATION)], batch_size=None
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.head(self.backbone(batch[0]), batch[1])
        self.selected.append(self.head.selected)
        return loss

    def configure_optimizers(self) -> Any:
        joint = JointOptimizer(
            torch.optim.SGD(self.backbone.parameters(), **SGD), RowOptimizer(torch.optim.SGD, self.head, **SGD)
        )
        return [joint], [torch.optim.lr_scheduler.LambdaLR(joint, lambda epoch: 1 - epoch / STEPS)]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.norms.append(clip_grad_norm_(self.backbone.parameters(), self.head, max_norm=gradient_clip_val))


def trainer(world: int, folder: str, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world,
        "strategy": HeadStrategy(process_group_backend="gloo"),
        "max_epochs": STEPS,
        "accumulate_grad_batches": ACCUMULATION,
        "gradient_clip_val": MAX_NORM,
        "use_distributed_sampler": False,
        "reload_dataloaders_every_n_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last="link")],
    }
    return pl.Trainer(**{**settings, **options})


def fit(
    rank: int, world: int, folder: str, rate: float, options: dict[str, Any], ckpt_path: str | None = None
) -> Result:
    module = Recogniser(rank, world, rate)
    trainer(world, folder, **options).fit(module, ckpt_path=ckpt_path)
    return finish(module.backbone, module.head, module.norms, module.selected)


RATES = [1 - step / STEPS for step in range(STEPS)]


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_lightning_equals_one_dense_process(ranks, tmp_path, rate):
    compare(ranks(2).run(fit, str(tmp_path), rate, {}, timeout=IMPORTING), rates=RATES)


def test_bf16(ranks, tmp_path):
    """Within the rounding of the products' inputs, 2^-8 of each, in weights that move by half a unit."""
    error = compare(
        ranks(2).run(fit, str(tmp_path), 1.0, {"precision": "bf16-mixed"}, timeout=IMPORTING), 1e-2, rates=RATES
    )
    assert error > 1e-5, "autocast took part"


def test_a_lightning_run_resumes_at_any_world_size(ranks, tmp_path):
    straight = ranks(2).run(fit, str(tmp_path), 1.0, {}, timeout=IMPORTING)
    saved = tmp_path / f"epoch={SAVED_AFTER - 1}.ckpt"
    assert not any(key.startswith("head") for key in torch.load(saved, weights_only=False)["state_dict"])
    for world in (2, 1):
        compare_resumed(
            straight, ranks(world).run(fit, str(tmp_path / "again"), 1.0, {}, str(saved), timeout=IMPORTING)
        )


def without_a_head(rank: int, world: int, folder: str) -> str:
    class Plain(Recogniser):
        def configure_model(self) -> None:
            self.backbone = nn.Linear(2, 2)

    try:
        trainer(world, folder).fit(Plain(rank, world, 1.0))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_module_without_a_head_is_told_what_to_do(ranks, tmp_path):
    for text in ranks(2).run(without_a_head, str(tmp_path), timeout=IMPORTING):
        assert "build it in configure_model()" in text


class Apart(Recogniser):
    """Manual optimization by two optimizers, one of them a RowOptimizer, of the first micro-batch of each step."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        both: Any = self.optimizers()
        if index:
            return
        for each in both:
            each.zero_grad()
        self.manual_backward(super().training_step(batch))
        for each in both:
            each.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.backbone.parameters(), **SGD),
            RowOptimizer(torch.optim.SGD, self.head, **SGD),
        ]


APART: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None}


def fit_apart(rank: int, world: int, folder: str, epochs: int, ckpt_path: str | None) -> Result:
    module = Apart(rank, world, 1.0)
    trainer(world, folder, **APART, max_epochs=epochs).fit(module, ckpt_path=ckpt_path)
    return finish(module.backbone, module.head, module.norms, module.selected)


def test_a_row_optimizer_by_itself_is_saved_and_resumed(ranks, tmp_path):
    """From last.ckpt, which is a link to the last file; the folder of the heads is beside that."""
    straight = ranks(2).run(fit_apart, str(tmp_path / "straight"), 4, None, timeout=IMPORTING)
    ranks(2).run(fit_apart, str(tmp_path / "begun"), 2, None, timeout=IMPORTING)
    last = tmp_path / "begun" / "last.ckpt"
    assert last.is_symlink() and not (tmp_path / "begun" / "last.ckpt.heads").exists()
    again = ranks(2).run(fit_apart, str(tmp_path / "again"), 4, str(last), timeout=IMPORTING)
    compare_resumed(straight, again)


def refused(rank: int, world: int, folder: str) -> list[str]:
    class AllInOne(Recogniser):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), **SGD)

    class OneOfTwo(Recogniser):
        def configure_optimizers(self) -> Any:
            return JointOptimizer(torch.optim.SGD(self.parameters(), **SGD))

    said = []
    options: dict[str, Any] = {"max_epochs": 1}
    averaging = [*trainer(world, folder).callbacks, EMAWeightAveraging(decay=0.5)]
    for module, more in ((AllInOne, {}), (OneOfTwo, {}), (Recogniser, {"callbacks": averaging})):
        try:
            trainer(world, folder, **options, **more).fit(module(rank, world, 1.0))
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_rows_that_one_rank_would_save_are_refused(ranks, tmp_path):
    words = "configure_optimizers returned a SGD with rows of a head"
    for first, second, third in ranks(2).run(refused, str(tmp_path), timeout=IMPORTING):
        assert first.startswith(words) and second.startswith(words)
        assert third.startswith("the checkpoint has rows of a head in ['state_dict']['head.weight']")


def cut_short(rank: int, world: int, folder: str) -> list[str]:
    """Resuming after a save that wrote the heads alone over an earlier checkpoint; from one of an earlier version; and
    from one of an earlier version that was written over."""
    file, said = f"{folder}/newest.ckpt", []

    def fitted(epochs: int, ckpt_path: str | None = None) -> pl.Trainer:
        made = trainer(world, folder, max_epochs=epochs, callbacks=[])
        made.fit(Recogniser(rank, world, 1.0), ckpt_path=ckpt_path)
        return made

    def resumed() -> None:
        try:
            fitted(2, file)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))

    made = fitted(1)
    made.save_checkpoint(file)
    heads = {**made.strategy._heads(), **made.strategy._head_optimizers()}
    save_checkpoint(f"{file}.heads", **heads, save_token=Token())
    resumed()
    save_checkpoint(f"{file}.heads", **heads)
    if rank == 0:
        stored = torch.load(file, weights_only=False)
        del stored["partial_fc_save_token"]
        torch.save(stored, file)
    made.strategy.barrier()
    resumed()
    save_checkpoint(f"{file}.heads", **heads, save_token=Token())
    resumed()
    return said


def test_a_save_that_was_cut_short_is_refused(ranks, tmp_path):
    first, second = ranks(2).run(cut_short, str(tmp_path), timeout=IMPORTING)
    assert first == second and first[1] == "nothing"
    for text in (first[0], first[2]):
        assert "newest.ckpt.heads and " in text and "newest.ckpt are not of the same save" in text
