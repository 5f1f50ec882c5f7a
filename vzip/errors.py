"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake that its user can mend: the message names the setting, its value, what is allowed and what to do.

    Commands print it without a traceback and exit with code 2; the library raises it before any work is spent.
    """
