"""The errors of runs and searches that a user can act on."""

from dmvae.config.errors import UserError


class RunError(UserError):
    """A run or a search cannot start, resume or finish, for a reason that the user can fix."""
