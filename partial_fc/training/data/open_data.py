"""From the settings of a run to its data sets: `open_data` returns the training set and the evaluation sets.

The order of identities and images depends only on their names and the seed, so it is the same on every rank.
"""

from __future__ import annotations

from partial_fc.training.data.config import DataConfig
from partial_fc.training.data.dataset import IdentityDataset, identity_count
from partial_fc.training.data.formats.detect import open_source
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.data.formats.packed import is_packed, packed_splits
from partial_fc.training.data.labels import LabelMap, with_enough_images
from partial_fc.training.data.splits import DataSplits, split_identities
from partial_fc.training.errors import UserError


def open_data(config: DataConfig, seed: int) -> DataSplits:
    """Open the data that `config` names; `seed` draws the held-out identities. Raises UserError if it cannot."""
    if config.folder is None:
        return _open_embedded_glyphs(config)
    if is_packed(config.folder):
        return _open_packed(config, config.folder)
    return _open_files(config, config.folder, seed)


def _open_embedded_glyphs(config: DataConfig) -> DataSplits:
    if config.image_size not in (None, 32) or config.channels not in (None, 1):
        raise UserError("the embedded glyphs are grey, 32 pixels wide; drop --data.image_size and --data.channels")
    if config.holdout_identities:
        raise UserError("the embedded glyphs have their own held-out identities; drop --data.holdout_identities")
    if config.split is not None:
        raise UserError("the embedded glyphs have no splits to choose from; drop --data.split")
    train = GlyphIdentities("train", config.identities)
    # Every character has the same number of images, so this keeps all identities or raises UserError.
    with_enough_images(range(train.num_identities), train.labels, config.min_images)
    return DataSplits(train, {"seen": GlyphIdentities("seen"), "new": GlyphIdentities("new")})


def _open_packed(config: DataConfig, folder: str) -> DataSplits:
    splits = packed_splits(folder)
    whole = splits.pop("train")
    channels, _, width = whole.image_shape
    if config.image_size not in (None, width) or config.channels not in (None, channels):
        raise UserError(
            f"the images of {folder} have {width} pixels and {channels} channel(s); drop --data.image_size and "
            "--data.channels"
        )
    if config.holdout_identities:
        raise UserError(f"the packed data set {folder} has its own held-out identities; drop --data.holdout_identities")
    if config.split is not None:
        raise UserError(f"the packed data set {folder} was split when it was made; drop --data.split")
    if not len(whole):
        raise UserError(f"the packed data set {folder} holds out all that it has, which leaves nothing to train on")
    kept = with_enough_images(range(whole.num_identities), whole.labels, config.min_images)
    kept = kept[: identity_count(config.identities, len(kept), f"the packed data set {folder} (train)")]
    return DataSplits(whole.select(kept), {**splits}, LabelMap.of(whole.identity_names, whole.labels, kept))


def _open_files(config: DataConfig, folder: str, seed: int) -> DataSplits:
    whole = open_source(
        folder,
        config.image_size or 112,
        config.channels or 3,
        format=config.format,
        on_error=config.on_error,
        image_column=config.image_column,
        label_column=config.label_column,
        split=config.split,
    )
    kept, held_out = split_identities(whole.num_identities, config.holdout_identities, seed)
    kept = with_enough_images(kept, whole.labels, config.min_images)
    others = "those held out or with too few images" if config.min_images > 1 else "those held out"
    kept = kept[: identity_count(config.identities, len(kept), f"the data folder {folder}, not counting {others}")]
    evaluation: dict[str, IdentityDataset] = {"holdout": whole.select(held_out)} if held_out else {}
    return DataSplits(whole.select(kept), evaluation, LabelMap.of(whole.identity_names, whole.labels, kept))
