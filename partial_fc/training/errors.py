"""The exceptions that the application shows without a traceback."""


class UserError(Exception):
    """A mistake that the user can correct, shown in one line that says what is wrong and what to do."""


class Preempted(Exception):
    """A run was asked to stop and has saved its state; the exit code is PreemptionGuard.EXIT_CODE."""
