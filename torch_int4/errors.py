"""The one error type of this package."""


class Int4Error(ValueError):
    """The request cannot be served. The message names the thing, the reason and a remedy."""
