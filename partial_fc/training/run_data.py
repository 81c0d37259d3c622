"""The data sets of a run that has trained, for the commands that measure its backbone or look at its classes, and for
runs that start from its weights.

Which identities are held out is drawn anew whenever the data are opened, by their number and the seed. If identities
were added or removed since the run began, the draw is another one, and identities that the run has trained on may be
among those held out. So the sets that a command uses are compared with data.json in the run folder, as --resume does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from partial_fc.training.config import RunConfig
from partial_fc.training.data import DataSplits, open_data
from partial_fc.training.data.labels import LABELS, class_names
from partial_fc.training.data.splits import TRAINING
from partial_fc.training.errors import UserError
from partial_fc.training.files import text_of
from partial_fc.training.mixing import mixed
from partial_fc.training.run import CONFIG, DATA, RunFolder
from partial_fc.training.saved import checkpoint_in

SAME_DATA = "give the data set and the settings that it was trained with"


def data_of_run(run: RunFolder, config: RunConfig, *, training: bool) -> DataSplits:
    """Return the data sets of `run`: its own training set, not mixed with others, and its evaluation sets.

    training: compare the training set, too; else the evaluation sets alone. Raises UserError for data that cannot be
    opened, or that have changed since the run began.
    """
    splits = open_data(config.data, config.seed)
    now = {name: each.fingerprint() for name, each in splits.evaluation.items()}
    changed = run.changed_data(now, training=False)
    if training or (changed and not config.data.mix):  # files that are new to a held-out set need not be new
        now[TRAINING] = mixed(config, splits.train).fingerprint()
        changed = run.changed_data(now) or changed
    if changed:
        raise UserError(
            f"the data of {run.path} have changed since the run began, and identities that it was trained on may count "
            f"as held out: {changed}; restore them, give a data set with --data FOLDER, or remove {run.path / DATA} to "
            "take the data as they are"
        )
    return splits


def check_classes(run: Path, names: Sequence[str], data: str, advice: str = SAME_DATA) -> None:
    """Raise UserError if the identities `names` of the data set `data` are not the classes of the run folder `run`."""
    path = run / LABELS
    if not path.exists():
        return
    for label, (theirs, mine) in enumerate(zip(class_names(path), names, strict=False)):
        if theirs != mine:
            raise UserError(f"class {label} of {run} is {theirs}, but that of {data} is {mine}; {advice}")


def held_out_of_weights(config: RunConfig, data: DataSplits) -> str | None:
    """Return a warning if the run that the backbone's weights are of was trained on identities that are held out here.

    Identities are told by their names, so it is looked for only where both runs name the same data.
    """
    given = config.backbone.weights
    checkpoint = None if given is None else checkpoint_in(given)
    if checkpoint is None or config.data.folder is None:
        return None
    run = checkpoint.parent.parent
    try:
        settings = yaml.safe_load(text_of(run / CONFIG))
        seed, folder = settings["seed"], settings["data"]["folder"]
        trained = set(class_names(run / LABELS))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError, UserError):
        return None  # a checkpoint of no run
    if folder is None or Path(folder).resolve() != Path(config.data.folder).resolve():
        return None
    for name, dataset in data.evaluation.items():
        both = trained & set(dataset.identity_names)
        if both:
            return (
                f"warning: --backbone.weights {given} was trained on {len(both):,} of the {dataset.num_identities:,} "
                f"identities of the {name} set, so its figures will be too good; --seed {seed} and the data settings "
                "of that run hold out the same as it did"
            )
    return None
