"""The exceptions that the application shows without a traceback."""


class UserError(Exception):
    """A mistake that the user can correct, shown in one line that says what is wrong and what to do."""


class Preempted(Exception):
    """A run was asked to stop and has saved its state; the exit code is PreemptionGuard.EXIT_CODE."""


def words(error: OSError) -> str:
    """Return an error of the file system as text: the file, if the error names one, and the cause."""
    if error.filename is None or not error.strerror:
        return " ".join((str(error) if error.errno is None else error.strerror or str(error)).split())
    return f"{error.filename}: {error.strerror}"


def check_at_least(setting: str, value: float, least: float) -> None:
    """Raise UserError if the value of a setting is below `least`, or NaN."""
    if not value >= least:
        raise UserError(f"--{setting} is {value}; give at least {least}")
