"""The one exception that a command shows to its user without a traceback."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and the remedy, in one line."""
