"""Checkpoints that load at any world size: two functions for one checkpoint, `Checkpointer` for those of a run."""

from partial_fc.checkpoint.checkpointer import Checkpointer
from partial_fc.checkpoint.save_load import Stateful, load_checkpoint, save_checkpoint

__all__ = ["Checkpointer", "Stateful", "load_checkpoint", "save_checkpoint"]
