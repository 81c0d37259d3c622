"""The command `partial-fc doctor CONFIG`: is a run set up correctly?

It builds the parts of the run, checks them, and discards them. No run folder is made.

accelerate launch --config_file configs/accelerate/cpu2.yaml -m partial_fc doctor configs/quickstart.yaml
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from partial_fc.diagnosis.doctor import doctor
from partial_fc.training.cli.parser import add_traceback, config_first
from partial_fc.training.config import add_config, to_config
from partial_fc.training.effects import check_effects
from partial_fc.training.errors import UserError
from partial_fc.training.ranks import check_devices
from partial_fc.training.settings_parser import SettingsParser

MAX_IMAGES = 32  # of a rank's first batch


def doctor_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc doctor",
        description="Run two training steps, report what they show, and restore everything; exit code 1 if something "
        "is wrong.",
        exit_on_error=False,
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_traceback(parser)
    return parser


def doctor_command(arguments: list[str]) -> int:
    """`partial-fc doctor`: print the report on the first rank. Return 0 if all checks pass, else 1.

    Raises UserError for invalid settings.
    """
    arguments = config_first(arguments)
    parser = doctor_parser()
    config = to_config(parser, arguments)
    check_effects(config)
    if config.data.mix:
        raise UserError("doctor checks a single head; run it without --data.mix")
    if config.head.storage is not None:
        raise UserError("doctor keeps a copy of all that it restores in memory; run it without --head.storage")
    as_json = parser.parse_args(arguments).json
    check_devices(config.train.cpu)
    from partial_fc.training.trainer import Trainer

    class Unclaimed(Trainer):
        def take_folder(self) -> None:
            """Do nothing: doctor makes no run folder."""

    with tempfile.TemporaryDirectory() as folder:  # the trainer needs a free folder; the run's own may exist
        config.output.folder = str(Path(folder) / "run")
        trainer = Unclaimed(config)
        trainer.loader.set_epoch(0)
        batch = next(trainer.micro_batches.usable(trainer.loader.iterate(0)), None)
        if batch is None:
            raise UserError("the first epoch has no usable batch; check data.folder and data.on_error")
        images, labels = (t[:MAX_IMAGES].to(trainer.accelerator.device) for t in (batch.images, batch.labels))
        with trainer.engine.autocast():
            report = doctor(
                trainer.engine.model,
                trainer.head,
                [trainer.engine.prepared, trainer.head_optimizer],
                batch=(images, labels),
                accelerator=trainer.accelerator,
            )
        if trainer.main:
            print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if as_json else report)
        trainer.close()
    return 0 if report.ok else 1
