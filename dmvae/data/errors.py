"""The error that bad data raises."""


class DatasetError(ValueError):
    """Data, or a request for data, that breaks a law; the message states the law, what was found and the remedy."""
