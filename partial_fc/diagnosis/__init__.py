"""Is it wired right? `doctor` and `check_margin`."""
