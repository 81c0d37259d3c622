"""Module paths of version 0.1 keep working for one release."""

from __future__ import annotations

import importlib
import warnings

import pytest

import partial_fc
from partial_fc.old_paths import MOVED

# a name that each module had, and that users may have imported
NAMES = {
    "agreement": "on_every_rank",
    "check": "check_margin",
    "checkpointer": "Checkpointer",
    "collectives": "NonFiniteError",
    "comms": "comms",
    "costs": "sizes",
    "divergence": "DivergenceWatch",
    "doctor": "doctor",
    "exchange": "export_weights",
    "joining": "JoinedBatches",
    "locks": "FolderLock",
    "manifest": "read_manifest",
    "means": "Batches",
    "migration": "RankFiles",
    "missing": "RankMissing",
    "moves": "class_mapping",
    "plan": "plan",
    "preemption": "PreemptionGuard",
    "queries": "Neighbours",
    "random_state": "RandomState",
    "safetensors_file": "read_header",
    "shards": "ClassShards",
    "storage": "SafeReader",
    "targets": "targets_of",
    "tiles": "logits_bytes",
    "trial": "Trial",
    "undo": "Undo",
    "wiring": "Wiring",
    "workspace": "Workspace",
    "wrapping": "refuse",
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_gives_the_object_of_the_new_one(old):
    module = importlib.import_module(f"partial_fc.{old}")
    with pytest.warns(DeprecationWarning, match=rf"partial_fc\.{old}\.{NAMES[old]} has moved to partial_fc\."):
        found = getattr(module, NAMES[old])
    homes = [importlib.import_module(f"partial_fc.{new}") for new in MOVED[old]]
    assert any(getattr(home, NAMES[old], None) is found for home in homes)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


def test_packages_that_kept_their_names_have_what_users_import_from_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from partial_fc.checkpoint import load_checkpoint
        from partial_fc.margins import ArcFace
        from partial_fc.nonfinite import check_gradients
        from partial_fc.optim import RowOptimizer, clip_grad_norm_
    given = load_checkpoint, ArcFace, check_gradients, RowOptimizer, clip_grad_norm_
    assert given == tuple(getattr(partial_fc, each.__name__) for each in given)


def test_functions_are_not_shadowed_by_the_modules_that_had_their_names():
    assert callable(partial_fc.plan)
    assert callable(partial_fc.doctor)
