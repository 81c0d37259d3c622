"""The exceptions that the application shows without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one line that says what is wrong and what to do."""


class Preempted(Exception):
    """A run that was asked to stop has saved what it had; shown as one line, and the command leaves with PreemptionGuard.EXIT_CODE."""
