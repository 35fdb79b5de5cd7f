"""The error for invalid data."""


class DatasetError(ValueError):
    """Invalid data, or a request for data that does not exist; the message says what is wrong, where, and the fix."""
