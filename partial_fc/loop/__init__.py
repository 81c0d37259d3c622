"""Helpers of a training loop: data that end, signals, ranks that begin to differ."""
