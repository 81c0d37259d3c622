"""Experiment trackers of a run: what is logged, also sent to TensorBoard, Weights & Biases, MLflow, or a tracker of
your own.

    settings    which trackers, under which project and name                       OutputConfig
    kinds       what each needs: arguments of Accelerate's class for it, its link, pictures, a report
    sender      the calls of one tracker, in a thread of their own
    trackers    all of them; RUN/trackers.json keeps what a resumed run needs to continue the tracked runs
    secrets     texts without keys and passwords

Only the main process has trackers. Nothing that a tracker does, or fails to do, holds up a step.
"""

from partial_fc.training.trackers.settings import NAMES, OwnTracker, check_installed, check_names, check_own
from partial_fc.training.trackers.trackers import TRACKERS, Last, Trackers

__all__ = ["NAMES", "TRACKERS", "Last", "OwnTracker", "Trackers", "check_installed", "check_names", "check_own"]
