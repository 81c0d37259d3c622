"""The one exception that the application shows without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one line that says what is wrong and what to do."""
