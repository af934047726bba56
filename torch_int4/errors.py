"""The one error type of this package."""


class Int4Error(ValueError):
    """What was asked for cannot be done. The message names what, the reason and a remedy."""
