"""The command `partial-fc doctor CONFIG`: is a run wired right? Its parts are built, looked at and thrown away; no run folder is made.

accelerate launch --config_file configs/accelerate/cpu2.yaml -m partial_fc doctor configs/quickstart.yaml
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from partial_fc.diagnosis.doctor import doctor
from partial_fc.training.config import add_config, to_config
from partial_fc.training.errors import UserError
from partial_fc.training.settings_parser import SettingsParser

MOST_IMAGES = 32  # a rank, of its first batch


def doctor_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc doctor",
        description="Two steps of a run that leave nothing behind, and what they show; exit code 1 if something is wrong.",
        exit_on_error=False,
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def doctor_command(arguments: list[str]) -> int:
    """`partial-fc doctor`: print the report on the first rank; 0 if all is right, 1 if not. UserError for settings that no run can have."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", arguments[0], *arguments[1:]]
    parser = doctor_parser()
    config = to_config(parser, arguments)
    if config.data.mix:
        raise UserError("doctor looks at one head; leave --data.mix out")
    as_json = parser.parse_args(arguments).json
    from partial_fc.training.trainer import Trainer

    class Unclaimed(Trainer):
        def _claim(self) -> None:
            """The run folder is not for this."""

    with tempfile.TemporaryDirectory() as folder:  # a place that is free, whatever the run's own folder is
        config.output.folder = str(Path(folder) / "run")
        trainer = Unclaimed(config)
        trainer.loader.set_epoch(0)
        batch = next(trainer.micro_batches.agreed(trainer.loader.iterate(0)), None)
        if batch is None:
            raise UserError("the first epoch has no batch that can be used; see data.folder and data.on_error")
        images, labels = (t[:MOST_IMAGES].to(trainer.accelerator.device) for t in (batch.images, batch.labels))
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
