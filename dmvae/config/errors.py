"""The one kind of error that a command prints without a traceback."""


class UserError(RuntimeError):
    """Something that the user asked for cannot be done; the message says why and how to fix it."""
