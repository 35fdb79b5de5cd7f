"""The one kind of error that a command prints without a traceback, and how a command is told to stop."""


class UserError(RuntimeError):
    """Something that the user asked for cannot be done; the message says why and how to fix it."""


class Stopped(KeyboardInterrupt):
    """Something other than the keyboard asked for an orderly end; the message says what, and what was saved.

    Attributes:
        exit_code: of the command: 143 after SIGTERM, 75 (try again later) at the end of a time budget.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
