"""Helpers for a training loop: data that end at different times, signals, ranks that diverge."""
