"""The exceptions that the application shows without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one line that says what is wrong and what to do."""


class Preempted(Exception):
    """A run that was asked to stop has saved what it had; shown as one line, and the command leaves with
    PreemptionGuard.EXIT_CODE."""


def check_at_least(setting: str, value: float, least: float) -> None:
    """UserError if the value of a setting is below `least`, or NaN."""
    if not value >= least:
        raise UserError(f"--{setting} is {value}; give at least {least}")
